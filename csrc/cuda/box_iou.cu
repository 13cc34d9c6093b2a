// Overlaps of all pairs, dense or ragged: a block serves a tile of rows, a thread keeps its column's box in registers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "cuda/boxes.cuh"

namespace ssod {
namespace {

constexpr int kThreads = 128;
constexpr int kRowTile = 16;

// Result rows of `stride` columns; columns that a row's partners do not fill hold `pad`.
struct Matrix {
  void* data;
  ScalarType dtype;
  int64_t stride;
  double pad;
};

// Stores past the cache: the matrix is read by somebody else, later. `same` says that its dtype is T.
template <bool same, typename T>
__device__ __forceinline__ void store(const Matrix& m, int64_t i, T value) {
  if constexpr (same) {
    __stcs(static_cast<T*>(m.data) + i, value);
  } else if (m.dtype == ScalarType::Half) {
    static_cast<__half*>(m.data)[i] = __float2half_rn(static_cast<float>(value));
  } else if (m.dtype == ScalarType::BFloat16) {
    static_cast<__nv_bfloat16*>(m.data)[i] = __float2bfloat16_rn(static_cast<float>(value));
  } else if (m.dtype == ScalarType::Float) {
    static_cast<float*>(m.data)[i] = static_cast<float>(value);
  } else {
    static_cast<double*>(m.data)[i] = static_cast<double>(value);
  }
}

template <typename T>
struct Problem {
  BoxSet<T> set1, set2;
  Partners partners;
  BoxRule<T> rule;
  Matrix out;
  int64_t column_tiles;
  int columns_log2;  // columns of a block; its other threads work on further rows of the tile
};

template <Mode mode, bool zero, bool same, typename T>
__global__ void __launch_bounds__(kThreads) pairs_kernel(const Problem<T> p) {
  __shared__ Box<T> rows[kRowTile];
  __shared__ Range ranges[kRowTile];
  const int64_t first = blockIdx.x / p.column_tiles * kRowTile;
  const int64_t left = p.set1.rows.count - first;
  const int count = left < kRowTile ? static_cast<int>(left) : kRowTile;
  if (threadIdx.x < count) {
    rows[threadIdx.x] = p.set1.template load<mode>(first + threadIdx.x, p.rule);
    ranges[threadIdx.x] = p.partners.of(first + threadIdx.x);
  }
  __syncthreads();
  const int columns = 1 << p.columns_log2;
  const int64_t j = (blockIdx.x % p.column_tiles) * columns + (threadIdx.x & (columns - 1));
  if (j >= p.out.stride) {
    return;
  }
  Box<T> b{};
  int64_t loaded = -1;
  for (int r = threadIdx.x >> p.columns_log2; r < count; r += kThreads >> p.columns_log2) {
    const Range range = ranges[r];
    T value = static_cast<T>(p.out.pad);
    if (j < range.size) {
      if (range.begin != loaded) {  // the rows of a tile mostly share their partners
        b = p.set2.template load<mode>(range.begin + j, p.rule);
        loaded = range.begin;
      }
      value = overlap<mode, zero>(rows[r], b, p.rule.eps);
      value = p.rule.nan_zero && value != value ? T(0) : value;
    }
    store<same>(p.out, (first + r) * p.out.stride + j, value);
  }
}

// The smallest power of two that is not below x, between 8 and kThreads.
int log2_columns(int64_t x) {
  int log2 = 3;
  while ((int64_t{1} << log2) < x && (1 << log2) < kThreads) {
    ++log2;
  }
  return log2;
}

template <typename T>
void launch(Problem<T> p, Mode mode, bool same, cudaStream_t stream) {
  p.columns_log2 = log2_columns(p.out.stride);
  p.column_tiles = ceil_div(p.out.stride, int64_t{1} << p.columns_log2);
  const int64_t blocks = p.column_tiles * ceil_div(p.set1.rows.count, kRowTile);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "box_iou: too many pairs for one launch");
  with_rule(mode, p.rule.zero, [&](auto mode_c, auto zero_c) {
    with_flag(same, [&](auto same_c) {
      pairs_kernel<decltype(mode_c)::value, decltype(zero_c)::value, decltype(same_c)::value>
          <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
    });
  });
  check_launch("box_iou");
}

void fill(Tensor boxes1, Tensor boxes2, const Partners& partners, int64_t mode, int64_t fmt, int64_t eps_mode,
          double eps, bool nan_zero, Tensor& out, double pad) {
  if (out.numel() == 0) {
    return;
  }
  const DeviceScope device(boxes1);
  const Matrix matrix{out.data_ptr(), out.scalar_type(), out.size(out.dim() - 1), pad};
  with_compute_type(boxes1, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p{make_box_set<T>(boxes1),
                       make_box_set<T>(boxes2),
                       partners,
                       make_box_rule<T>(fmt, eps_mode, eps, nan_zero),
                       matrix,
                       0,
                       0};
    launch(p, static_cast<Mode>(mode), out.scalar_type() == boxes1.scalar_type(), device.stream());
  });
}

void box_iou_out(Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps, bool nan_zero,
                 Tensor out) {
  fill(boxes1, boxes2, make_partners(boxes1, boxes2, {}, {}), mode, fmt, eps_mode, eps, nan_zero, out, 0);
}

Tensor box_iou(Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps, bool nan_zero,
               ScalarType dtype) {
  std::vector<int64_t> sizes = first_sizes(boxes1, boxes1.dim() - 1);
  sizes.push_back(boxes2.size(boxes2.dim() - 2));
  Tensor out = new_cuda_output(boxes1, sizes, dtype);
  box_iou_out(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero, out);
  return out;
}

Tensor ragged_box_iou(Tensor boxes1, Tensor offsets1, Tensor boxes2, Tensor offsets2, int64_t max_boxes2,
                      double pad_value, int64_t mode, int64_t fmt, int64_t eps_mode, double eps, bool nan_zero,
                      ScalarType dtype) {
  Tensor out = new_cuda_output(boxes1, {boxes1.size(0), max_boxes2}, dtype);
  fill(boxes1, boxes2, make_partners(boxes1, boxes2, offsets1, offsets2), mode, fmt, eps_mode, eps, nan_zero, out,
       pad_value);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou));
  m.impl("box_iou.out", TORCH_BOX(&box_iou_out));
  m.impl("ragged_box_iou", TORCH_BOX(&ragged_box_iou));
}

}  // namespace
}  // namespace ssod
