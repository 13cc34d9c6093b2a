// Query-major costs to target-major ones, matrix by matrix.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace ssod {
namespace {

// Columns are split too: a single matrix may be large. A task takes whole blocks of columns of one matrix.
template <typename T>
void transpose_all(const T* in, T* out, int64_t matrices, int64_t rows, int64_t columns) {
  const int64_t strips = (columns + kSquare - 1) / kSquare;
  parallel_rows(matrices * strips, rows * kSquare, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t matrix = task / strips, last = std::min(end, (matrix + 1) * strips);
      const int64_t j = task % strips * kSquare;
      const int64_t width = std::min((last - matrix * strips) * kSquare, columns) - j, base = matrix * rows * columns;
      transpose_matrix(in + base + j, columns, rows, width, out + base + j * rows, rows);
      task = last;
    }
  });
}

// costs: contiguous [..., rows, columns], float32 or float64.
Tensor transpose_costs(Tensor costs) {
  const int64_t dims = costs.dim(), rows = costs.size(dims - 2), columns = costs.size(dims - 1);
  std::vector<int64_t> sizes = leading_sizes(costs, dims - 2);
  sizes.insert(sizes.end(), {columns, rows});
  Tensor out = new_output(sizes, costs.scalar_type());
  const int64_t count = costs.numel();
  if (count > 0) {
    const auto run = [&](auto t) {
      using T = decltype(t);
      transpose_all(static_cast<const T*>(costs.data_ptr()), static_cast<T*>(out.data_ptr()), count / (rows * columns),
                    rows, columns);
    };
    costs.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("transpose_costs", TORCH_BOX(&transpose_costs)); }

}  // namespace
}  // namespace ssod
