// The best partner of each box without the matrix: a block serves a few boxes, its threads share their partners.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
// Boxes per block: each partner that is loaded serves all of them. Twice as many would spill.
template <typename T>
constexpr int kBoxesPerBlock = sizeof(T) == 4 ? 4 : 2;

template <typename T>
struct Best {
  T value;
  int64_t index;  // -1: none yet

  // Neither NaN nor -inf is ever taken; among equal values the lowest index wins.
  __device__ __forceinline__ void offer(T v, int64_t i) {
    if (v > value || (v == value && i >= 0 && i < index)) {
      value = v;
      index = i;
    }
  }
};

template <typename T>
struct Problem {
  BoxSet<T> own, other;  // `other` holds the partners
  Partners partners;
  BoxRule<T> rule;
  T* values;
  int64_t* indices;
};

// boxes1 is always the first argument: IoF is not symmetric.
template <Mode mode, bool zero, bool own_is_first, typename T>
__device__ __forceinline__ T score(const Box<T>& own, const Box<T>& other, const Eps<T>& eps) {
  if constexpr (own_is_first) {
    return overlap<mode, zero>(own, other, eps);
  } else {
    return overlap<mode, zero>(other, own, eps);
  }
}

// Offers all partners of kCount boxes that share them.
template <Mode mode, bool zero, bool own_is_first, int kCount, typename T>
__device__ __forceinline__ void scan(const Problem<T>& p, const Range& range, const Box<T>* own, Best<T>* best) {
  for (int64_t j = threadIdx.x; j < range.size; j += blockDim.x) {
    const Box<T> other = p.other.template load<mode>(range.begin + j, p.rule);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      best[k].offer(score<mode, zero, own_is_first>(own[k], other, p.rule.eps), j);
    }
  }
}

// The best of the block, in its first thread.
template <typename T>
__device__ __forceinline__ Best<T> reduce(Best<T> best) {
  __shared__ Best<T> partial[kMaxThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T value = __shfl_down_sync(0xffffffffu, best.value, distance);
    best.offer(value, __shfl_down_sync(0xffffffffu, best.index, distance));
  }
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = best;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) {
      best.offer(partial[w].value, partial[w].index);
    }
  }
  __syncthreads();  // before the next box reuses the partial results
  return best;
}

template <Mode mode, bool zero, bool own_is_first, typename T>
__global__ void __launch_bounds__(kMaxThreads, 1) max_kernel(const Problem<T> p) {
  constexpr int kBoxes = kBoxesPerBlock<T>;
  const int64_t first = int64_t{blockIdx.x} * kBoxes, count = p.own.rows.count;
  const int64_t last = count - 1;
  Box<T> own[kBoxes];
  Range ranges[kBoxes];
  Best<T> best[kBoxes];
  bool shared = true;
#pragma unroll
  for (int k = 0; k < kBoxes; ++k) {
    const int64_t i = first + k < last ? first + k : last;  // boxes beyond the end repeat the last one
    own[k] = p.own.template load<mode>(i, p.rule);
    ranges[k] = p.partners.of(i);
    best[k] = {minus_infinity<T>(), -1};
    shared = shared && ranges[k].begin == ranges[0].begin && ranges[k].size == ranges[0].size;
  }
  if (shared) {
    scan<mode, zero, own_is_first, kBoxes>(p, ranges[0], own, best);
  } else {
#pragma unroll
    for (int k = 0; k < kBoxes; ++k) {
      scan<mode, zero, own_is_first, 1>(p, ranges[k], own + k, best + k);
    }
  }
#pragma unroll
  for (int k = 0; k < kBoxes; ++k) {
    const Best<T> result = reduce(best[k]);
    if (threadIdx.x == 0 && first + k < count) {
      p.values[first + k] = result.index < 0 ? T(0) : result.value;
      p.indices[first + k] = result.index;
    }
  }
}

// About four partners per thread, so that short sides do not idle.
unsigned threads_for(int64_t partners) {
  unsigned threads = kWarp;
  while (threads < kMaxThreads && threads * 4 < partners) {
    threads *= 2;
  }
  return threads;
}

template <bool own_is_first, typename T>
void launch(const Problem<T>& p, Mode mode, cudaStream_t stream) {
  const int64_t count = p.own.rows.count;
  if (count == 0) {
    return;
  }
  const int64_t partners = p.partners.own ? ceil_div(p.other.rows.count, std::max<int64_t>(1, p.partners.images))
                                          : p.partners.other_per_item;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kBoxesPerBlock<T>));
  with_rule(mode, p.rule.zero, [&](auto mode_c, auto zero_c) {
    max_kernel<decltype(mode_c)::value, decltype(zero_c)::value, own_is_first>
        <<<blocks, threads_for(partners), 0, stream>>>(p);
  });
  check_launch("box_iou_max");
}

struct Outputs {
  Tensor values, indices;

  Outputs(const Tensor& boxes, bool wanted)
      : values(new_cuda_output(boxes, sizes(boxes, wanted), boxes.scalar_type())),
        indices(new_cuda_output(boxes, sizes(boxes, wanted), ScalarType::Long)) {}

  static std::vector<int64_t> sizes(const Tensor& boxes, bool wanted) {
    return wanted ? first_sizes(boxes, boxes.dim() - 1) : std::vector<int64_t>{0};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> box_iou_max(Tensor boxes1, Tensor boxes2, std::optional<Tensor> offsets1,
                                                       std::optional<Tensor> offsets2, int64_t mode, int64_t fmt,
                                                       int64_t eps_mode, double eps, bool rows, bool cols) {
  const DeviceScope device(boxes1);
  Outputs out1(boxes1, rows), out2(boxes2, cols);
  with_compute_type(boxes1, [&](auto t) {
    using T = decltype(t);
    const BoxSet<T> set1 = make_box_set<T>(boxes1), set2 = make_box_set<T>(boxes2);
    const BoxRule<T> rule = make_box_rule<T>(fmt, eps_mode, eps, false);
    const auto problem = [&](const BoxSet<T>& own, const BoxSet<T>& other, const Partners& partners,
                             const Outputs& out) {
      return Problem<T>{own,
                        other,
                        partners,
                        rule,
                        static_cast<T*>(out.values.data_ptr()),
                        static_cast<int64_t*>(out.indices.data_ptr())};
    };
    if (rows) {
      launch<true>(problem(set1, set2, make_partners(boxes1, boxes2, offsets1, offsets2), out1),
                   static_cast<Mode>(mode), device.stream());
    }
    if (cols) {
      launch<false>(problem(set2, set1, make_partners(boxes2, boxes1, offsets2, offsets1), out2),
                    static_cast<Mode>(mode), device.stream());
    }
  });
  return {out1.values, out1.indices, out2.values, out2.indices};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("box_iou_max", TORCH_BOX(&box_iou_max)); }

}  // namespace
}  // namespace ssod
