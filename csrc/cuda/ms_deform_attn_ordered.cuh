// Launch of csrc/ms_deform_attn_ordered.h: four warps per run of tokens, each with a quarter of the samples.
#pragma once

#include "cuda/ms_deform_attn.cuh"
#include "ms_deform_attn_ordered.h"

namespace ssod::deform {

constexpr int kParts = kThreads / 32;

template <typename V>
using OrderedTraits = LaneTraits<V, 32, 1, false>;

template <typename T>
constexpr int kOwnedTokens = 256 / sizeof(T);  // the sums of a block are 32 KB

template <typename V>
struct OrderedProblem {
  LevelSource levels;
  double offset_scale;
  OrderedInput<OrderedTraits<V>> input;
  V* grad_value;        // [B, S, M, C]
  int32_t runs, slabs;  // of tokens and of channels
};

template <typename V>
__device__ OwnedTokens owned_tokens(const OrderedProblem<V>& p) {
  constexpr int32_t kTokens = kOwnedTokens<WideOf<V>>;
  const int64_t outer = blockIdx.x / p.runs;
  const auto run = static_cast<int32_t>(blockIdx.x - outer * p.runs);
  const int32_t left = p.input.tokens - run * kTokens;
  const auto slab = static_cast<int32_t>(outer % p.slabs);
  const int64_t pair = outer / p.slabs;
  const auto image = static_cast<int32_t>(pair / p.input.samples.heads);
  const auto head = static_cast<int32_t>(pair - int64_t{image} * p.input.samples.heads);
  return {image, head, run * kTokens, left < kTokens ? left : kTokens, slab * 32};
}

// Adds the sums of the parts, in order, and writes every token of the block.
template <typename V>
__device__ void write_owned(const OrderedProblem<V>& p, const OwnedTokens& own, const WideOf<V>* sums) {
  using T = WideOf<V>;
  const int32_t channel = own.channel + static_cast<int32_t>(threadIdx.x % 32);
  const int64_t token = int64_t{own.image} * p.input.tokens + own.first;
  for (int32_t t = threadIdx.x / 32; t < own.count && channel < p.input.channels; t += kParts) {
    T sum = 0;
    for (int part = 0; part < kParts; ++part) {
      sum += sums[(part * kOwnedTokens<T> + t) * 32 + threadIdx.x % 32];
    }
    p.grad_value[((token + t) * p.input.samples.heads + own.head) * p.input.channels + channel] = narrow<V>(sum);
  }
}

template <bool fused, typename V>
__global__ void __launch_bounds__(kThreads) ordered_kernel(const __grid_constant__ OrderedProblem<V> p) {
  using Traits = OrderedTraits<V>;
  using T = typename Traits::T;
  constexpr int kSums = kOwnedTokens<T> * 32;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ BoardOf<Traits> boards[kParts];
  __shared__ T sums[kParts * kSums];
  auto* levels = reinterpret_cast<SampledLevel<T>*>(shared);
  BlockThreads block;
  for (int i = threadIdx.x; i < kParts * kSums; i += kThreads) {
    sums[i] = 0;
  }
  fill_levels(block, p.levels, p.offset_scale, levels);
  const OwnedTokens own = owned_tokens(p);
  const int part = threadIdx.x / 32;
  LaneGroup<32> group;
  add_part_in_order<fused>(group, p.input, levels, own, part, kParts, boards[part], sums + part * kSums);
  __syncthreads();
  write_owned(p, own, sums);
}

// grad_value, every element of it.
template <typename V>
void sum_in_order(const Arguments& a, const Tensor& grad_output, const std::optional<Tensor>& lse,
                  const Tensor& grad_value, cudaStream_t stream) {
  using T = WideOf<V>;
  const int64_t runs = ceil_div(a.tokens(), kOwnedTokens<T>), slabs = ceil_div(a.channels(), 32);
  const int64_t blocks = runs * slabs * a.heads() * a.images();
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "ms_deform_attn_backward: value is too large");
  const OrderedProblem<V> p{
      make_level_source(a),
      a.offset_scale,
      {make_sample_input<T>(a), a.queries(), static_cast<int32_t>(a.tokens()), static_cast<int32_t>(a.channels()),
       static_cast<const V*>(grad_output.data_ptr()), lse ? static_cast<const T*>(lse->data_ptr()) : nullptr},
      static_cast<V*>(grad_value.data_ptr()),
      static_cast<int32_t>(runs),
      static_cast<int32_t>(slabs)};
  const auto kernel = lse ? ordered_kernel<true, V> : ordered_kernel<false, V>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, a.levels() * sizeof(SampledLevel<T>), stream>>>(p);
  check_launch("ms_deform_attn_backward");
}

}  // namespace ssod::deform
