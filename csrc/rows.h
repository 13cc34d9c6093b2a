// Where the rows of a tensor [..., K] with contiguous last dimension lie: leading dimensions, merged as far as their
// strides allow.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __CUDACC__
#define SSOD_ROWS_HD __host__ __device__ __forceinline__
#else
#define SSOD_ROWS_HD inline
#endif

namespace ssod {

constexpr int kMaxRowDims = 6;

struct Rows {
  int64_t size[kMaxRowDims];
  int64_t stride[kMaxRowDims];
  int64_t count;  // number of rows
  int dims;       // innermost first, at least 1

  // Offset of a row in elements. Strides may be 0 (broadcast).
  SSOD_ROWS_HD int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int d = 0; d + 1 < dims; ++d) {
      result += row % size[d] * stride[d];
      row /= size[d];
    }
    return result + row * stride[dims - 1];
  }

  bool dense(int64_t width) const { return dims == 1 && (stride[0] == width || count <= 1); }
};

// Rows over the first `lead` dimensions. False where more than kMaxRowDims remain after merging.
inline bool try_rows(const torch::stable::Tensor& t, int64_t lead, Rows& rows) {
  rows = {{}, {}, 1, 0};
  const auto sizes = t.sizes(), strides = t.strides();
  for (int64_t d = lead - 1; d >= 0; --d) {
    const int64_t size = sizes[d], stride = strides[d];
    rows.count *= size;
    if (size == 1) {
      continue;
    }
    const int last = rows.dims - 1;
    if (last >= 0 && stride == rows.stride[last] * rows.size[last]) {
      rows.size[last] *= size;
    } else if (rows.dims == kMaxRowDims) {
      return false;
    } else {
      rows.size[rows.dims] = size;
      rows.stride[rows.dims++] = stride;
    }
  }
  if (rows.dims == 0) {  // one row
    rows.size[0] = 1;
    rows.stride[0] = 0;
    rows.dims = 1;
  }
  return true;
}

// Rows of `t`, which is replaced by a contiguous copy in the rare case of too many dimensions that do not merge.
inline Rows make_rows(torch::stable::Tensor& t, int64_t lead) {
  Rows rows;
  if (!try_rows(t, lead, rows)) {
    t = torch::stable::contiguous(t);
    try_rows(t, lead, rows);
  }
  return rows;
}

}  // namespace ssod
