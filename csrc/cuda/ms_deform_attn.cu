// Multi-scale deformable attention: a group of lanes per query and head, one head per block.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/ms_deform_attn.cuh"

namespace ssod {
namespace {

using deform::Arguments;
using deform::kThreads;

template <typename Traits>
struct Problem {
  LevelSource levels;
  double offset_scale;
  RowSchedule schedule;
  InputOf<Traits> samples;
  TokenRows<typename Traits::V> value;
  typename Traits::V* out;  // [B, Q, M * C]
  typename Traits::T* lse;  // [B, Q, M], of the fused op
};

// Blocks per processor: as many as spill no registers; few where two channels per lane say that there is little work.
template <bool fused, typename Traits>
constexpr int kBlocks = Traits::kVector == 2 ? 4
                        : fused              ? 7
                                             : 8;

template <bool fused, typename Traits>
__global__ void __launch_bounds__(kThreads, kBlocks<fused, Traits>)
    attend_kernel(const __grid_constant__ Problem<Traits> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ BoardOf<Traits> boards[kThreads / 32];
  auto* levels = reinterpret_cast<SampledLevel<typename Traits::T>*>(shared);
  BlockThreads block;
  fill_levels(block, p.levels, p.offset_scale, levels);
  const BlockRows rows = block_rows(p.schedule, blockIdx.x, levels, p.levels.count);
  LaneGroup<Traits::kLanes> group;
  for (int32_t i = threadIdx.x / Traits::kLanes; i < p.schedule.per_block; i += Traits::kRows) {
    const SampleRow place = scheduled_row(p.schedule, rows, i, levels);
    attend_row<fused, Traits>(group, p.samples, levels, p.value, place, boards[threadIdx.x / 32], p.out, p.lse);
  }
}

template <typename Traits>
void launch(const Arguments& a, void* out, void* lse, cudaStream_t stream) {
  using T = typename Traits::T;
  using V = typename Traits::V;
  const Problem<Traits> p{deform::make_level_source(a),
                          a.offset_scale,
                          deform::schedule_for<Traits>(a),
                          deform::make_sample_input<T>(a),
                          deform::make_token_rows<V>(a.value),
                          static_cast<V*>(out),
                          static_cast<T*>(lse)};
  const size_t bytes = a.levels() * sizeof(SampledLevel<T>);
  const auto kernel = lse ? attend_kernel<true, Traits> : attend_kernel<false, Traits>;
  kernel<<<deform::blocks_of(a, p.schedule), kThreads, bytes, stream>>>(p);
  check_launch("ms_deform_attn");
}

void run(const Arguments& a, const Tensor& out, void* lse, cudaStream_t stream) {
  if (a.rows() == 0) {
    return;
  }
  const bool aligned = deform::heads_aligned(a.value, 16);
  deform::with_value_type(a.value, [&](auto v) {
    deform::with_lanes<decltype(v)>(a, aligned,
                                    [&](auto traits) { launch<decltype(traits)>(a, out.data_ptr(), lse, stream); });
  });
}

Tensor new_result(const Arguments& a) {
  return new_cuda_output(a.value, {a.images(), a.queries(), a.heads() * a.channels()}, a.value.scalar_type());
}

Tensor ms_deform_attn(Tensor value, std::optional<Tensor> spatial_shapes, std::optional<Tensor> level_start_index,
                      Tensor sampling_locations, Tensor attention_weights, deform::Sizes shapes_hw,
                      deform::Sizes num_points, int64_t method) {
  const DeviceScope device(value);
  const Arguments a{value,        spatial_shapes,     level_start_index,
                    std::nullopt, sampling_locations, attention_weights,
                    shapes_hw,    num_points,         method,
                    0.0};
  Tensor out = new_result(a);
  run(a, out, nullptr, device.stream());
  return out;
}

std::tuple<Tensor, Tensor> ms_deform_attn_fused(Tensor value, std::optional<Tensor> spatial_shapes,
                                                std::optional<Tensor> level_start_index, Tensor reference_points,
                                                Tensor sampling_offsets, Tensor attention_logits,
                                                deform::Sizes shapes_hw, deform::Sizes num_points,
                                                double offset_scale) {
  const DeviceScope device(value);
  const Arguments a{value,
                    spatial_shapes,
                    level_start_index,
                    reference_points,
                    sampling_offsets,
                    attention_logits,
                    shapes_hw,
                    num_points,
                    0,
                    offset_scale};
  Tensor out = new_result(a);
  Tensor lse = new_cuda_output(value, {a.images(), a.queries(), a.heads()}, reference_points.scalar_type());
  run(a, out, lse.data_ptr(), device.stream());
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
}

}  // namespace
}  // namespace ssod
