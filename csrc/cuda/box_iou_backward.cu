// Gradient of the overlaps of all pairs. Each side has its own kernel that computes the pairs again and sums in a fixed
// order, so nothing is stored per pair, there are no atomics, and results repeat.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;    // row kernel: one warp per row
constexpr int kLanesPerColumn = 8;  // column kernel: a block serves kWarp columns

template <typename T>
struct Problem {
  BoxSet<T> set1, set2;
  const T* grad;
  Rows grad_rows;
  int64_t column_stride;
  int64_t n, m;  // rows and columns of one batch item
  BoxRule<T> rule;
};

template <typename T>
__device__ __forceinline__ void add(CornerGrads<T>& sum, const CornerGrads<T>& g) {
  sum = {sum.x1 + g.x1, sum.y1 + g.y1, sum.x2 + g.x2, sum.y2 + g.y2};
}

// Gradients of all columns with respect to one box of boxes1.
template <Mode mode, bool zero, bool nan_zero, typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, 1) rows_kernel(const Problem<T> p, T* __restrict__ out) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
  if (row >= p.set1.rows.count) {
    return;
  }
  const Box<T> a = p.set1.template load<mode>(row, p.rule);
  const int64_t first = row / p.n * p.m;
  const T* grad = p.grad + p.grad_rows.offset(row);
  CornerGrads<T> sum{};
  for (int64_t j = threadIdx.x; j < p.m; j += kWarp) {
    CornerGrads<T> ga, gb;
    overlap_gradients<mode, zero, nan_zero>(a, p.set2.template load<mode>(first + j, p.rule), p.rule.eps,
                                            grad[j * p.column_stride], ga, gb);
    add(sum, ga);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    add(sum, CornerGrads<T>{
                 __shfl_down_sync(0xffffffffu, sum.x1, distance), __shfl_down_sync(0xffffffffu, sum.y1, distance),
                 __shfl_down_sync(0xffffffffu, sum.x2, distance), __shfl_down_sync(0xffffffffu, sum.y2, distance)});
  }
  if (threadIdx.x == 0) {
    store_grads(out + 4 * row, sum, p.rule.format);
  }
}

// Gradients of all rows with respect to the boxes of boxes2: neighbouring threads read neighbouring incoming gradients.
template <Mode mode, bool zero, bool nan_zero, typename T>
__global__ void __launch_bounds__(kWarp* kLanesPerColumn, 1)
    columns_kernel(const Problem<T> p, int64_t tiles_per_item, T* __restrict__ out) {
  __shared__ CornerGrads<T> partial[kLanesPerColumn][kWarp];
  const int64_t item = blockIdx.x / tiles_per_item;
  const int64_t j = blockIdx.x % tiles_per_item * kWarp + threadIdx.x;
  CornerGrads<T> sum{};
  if (j < p.m) {
    const Box<T> b = p.set2.template load<mode>(item * p.m + j, p.rule);
    for (int64_t i = threadIdx.y; i < p.n; i += kLanesPerColumn) {
      const int64_t row = item * p.n + i;
      CornerGrads<T> ga, gb;
      overlap_gradients<mode, zero, nan_zero>(p.set1.template load<mode>(row, p.rule), b, p.rule.eps,
                                              p.grad[p.grad_rows.offset(row) + j * p.column_stride], ga, gb);
      add(sum, gb);
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < p.m) {
    for (int k = 1; k < kLanesPerColumn; ++k) {
      add(sum, partial[k][threadIdx.x]);
    }
    store_grads(out + 4 * (item * p.m + j), sum, p.rule.format);
  }
}

// Launches what is wanted; out1 or out2 is null where it is not.
template <Mode mode, bool zero, bool nan_zero, typename T>
void launch(const Problem<T>& p, T* out1, T* out2, cudaStream_t stream) {
  const int64_t rows = p.set1.rows.count, columns = p.set2.rows.count;
  if (out1 && rows > 0) {
    const dim3 threads(kWarp, kRowsPerBlock);
    rows_kernel<mode, zero, nan_zero>
        <<<static_cast<unsigned>(ceil_div(rows, kRowsPerBlock)), threads, 0, stream>>>(p, out1);
    check_launch("box_iou_backward, boxes1");
  }
  if (out2 && columns > 0) {
    const dim3 threads(kWarp, kLanesPerColumn);
    const int64_t tiles = ceil_div(p.m, kWarp);
    columns_kernel<mode, zero, nan_zero>
        <<<static_cast<unsigned>(columns / p.m * tiles), threads, 0, stream>>>(p, tiles, out2);
    check_launch("box_iou_backward, boxes2");
  }
}

std::tuple<Tensor, Tensor> box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt,
                                            int64_t eps_mode, double eps, bool nan_zero, bool need1, bool need2) {
  const DeviceScope device(boxes1);
  const std::vector<int64_t> none{0};
  Tensor out1 = new_cuda_output(boxes1, need1 ? first_sizes(boxes1, boxes1.dim()) : none, boxes1.scalar_type());
  Tensor out2 = new_cuda_output(boxes2, need2 ? first_sizes(boxes2, boxes2.dim()) : none, boxes2.scalar_type());
  const Rows grad_rows = make_rows(grad, grad.dim() - 1);
  with_compute_type(boxes1, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p{make_box_set<T>(boxes1),
                       make_box_set<T>(boxes2),
                       static_cast<const T*>(grad.data_ptr()),
                       grad_rows,
                       grad.stride(grad.dim() - 1),
                       boxes1.size(boxes1.dim() - 2),
                       boxes2.size(boxes2.dim() - 2),
                       make_box_rule<T>(fmt, eps_mode, eps, nan_zero)};
    T* const data1 = need1 ? static_cast<T*>(out1.data_ptr()) : nullptr;
    T* const data2 = need2 ? static_cast<T*>(out2.data_ptr()) : nullptr;
    with_rule(static_cast<Mode>(mode), p.rule.zero, [&](auto mode_c, auto zero_c) {
      with_flag(nan_zero, [&](auto nan_zero_c) {
        launch<decltype(mode_c)::value, decltype(zero_c)::value, decltype(nan_zero_c)::value>(p, data1, data2,
                                                                                              device.stream());
      });
    });
  });
  return {out1, out2};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("box_iou_backward", TORCH_BOX(&box_iou_backward)); }

}  // namespace
}  // namespace ssod
