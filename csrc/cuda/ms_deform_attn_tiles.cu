// Launch of csrc/ms_deform_attn_tiles.h.
#include "cuda/ms_deform_attn_tiles.cuh"
#include "ms_deform_attn_tiles.h"

namespace ssod::deform {
namespace {

using Shape = TileShape<256, 32, 128>;
constexpr int kBlocksPerProcessor = 4;  // 64 registers each
constexpr int64_t kMaxSamples = 1 << 20;
constexpr size_t kStaticShared = 48 << 10;

struct TileThreads : BlockThreads {
  template <typename T>
  __device__ __forceinline__ T swap(T value, int distance) const {
    return __shfl_xor_sync(0xffffffffu, value, distance);
  }
  __device__ __forceinline__ int32_t next(int32_t& counter) const { return atomicAdd(&counter, 1); }
};

// 16 bytes per lane, and a slab of at most 128 bytes per group.
template <typename V, int lanes>
using TileTraits = LaneTraits<V, lanes, 16 / sizeof(V), false>;

template <typename Traits>
struct TileProblem {
  LevelSource levels;
  double offset_scale;
  uint32_t slabs;  // of channels
  TileInput<Traits> input;
};

template <bool fused, typename Traits>
__global__ void __launch_bounds__(Shape::kThreads, kBlocksPerProcessor)
    tile_kernel(const __grid_constant__ TileProblem<Traits> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ TileBoard<Traits, Shape> board;
  static_assert(sizeof(board) + kMaxLevels * sizeof(SampledLevel<float>) <= kStaticShared);
  auto* levels = reinterpret_cast<SampledLevel<float>*>(shared);
  TileThreads block;
  fill_levels(block, p.levels, p.offset_scale, levels);
  const uint32_t tile = blockIdx.x / p.slabs;
  const BlockRows rows = block_rows(p.input.schedule, tile, levels, p.levels.count);
  add_tile<fused>(block, p.input, rows, static_cast<int32_t>(blockIdx.x - tile * p.slabs), levels, board);
}

RowSchedule tile_schedule(const Arguments& a) {
  return {static_cast<int32_t>(a.queries()), static_cast<int32_t>(a.images()), static_cast<int32_t>(a.heads()),
          Shape::kRows, true};
}

template <typename Traits>
void launch(const Arguments& a, const Tensor& grad_output, const std::optional<Tensor>& lse, float* grad_value,
            cudaStream_t stream) {
  using V = typename Traits::V;
  const int64_t slabs = ceil_div(a.channels(), Traits::kLanes * Traits::kVector);
  const RowSchedule schedule = tile_schedule(a);
  const int64_t blocks = schedule.blocks() * slabs;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "ms_deform_attn_backward: value is too large");
  const TileProblem<Traits> p{make_level_source(a),
                              a.offset_scale,
                              static_cast<uint32_t>(slabs),
                              {make_sample_input<float>(a), schedule, static_cast<int32_t>(a.tokens()),
                               static_cast<int32_t>(a.channels()), static_cast<const V*>(grad_output.data_ptr()),
                               lse ? static_cast<const float*>(lse->data_ptr()) : nullptr, grad_value}};
  const size_t bytes = a.levels() * sizeof(SampledLevel<float>);
  const auto kernel = lse ? tile_kernel<true, Traits> : tile_kernel<false, Traits>;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, bytes, stream>>>(p);
  check_launch("ms_deform_attn_backward");
}

// Calls f with the traits of the fewest lanes that hold a row of so many bytes, or with those of a slab of it.
template <typename V, typename F>
void with_tile_lanes(int64_t bytes, F&& f) {
  if (bytes <= 32) {
    f(TileTraits<V, 2>{});
  } else if (bytes <= 64) {
    f(TileTraits<V, 4>{});
  } else {
    f(TileTraits<V, 8>{});
  }
}

}  // namespace

bool tiles_fit(const Arguments& a, const Tensor& grad_output) {
  const int64_t size = a.value.element_size();
  return a.queries() == a.tokens() && a.tokens() < Shape::kMaxTokens && a.samples() < kMaxSamples && size <= 4 &&
         a.channels() > 0 && a.channels() * size % 16 == 0 &&
         reinterpret_cast<uintptr_t>(grad_output.data_ptr()) % 16 == 0;
}

bool tiles_pay(const Arguments& a) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.value.get_device_index());
  return tile_schedule(a).blocks() >= processors;
}

void sum_in_tiles(const Arguments& a, const Tensor& grad_output, const std::optional<Tensor>& lse, float* grad_value,
                  cudaStream_t stream) {
  with_value_type(a.value, [&](auto v) {
    using V = decltype(v);
    if constexpr (!std::is_same_v<V, double>) {
      with_tile_lanes<V>(a.channels() * sizeof(V),
                         [&](auto traits) { launch<decltype(traits)>(a, grad_output, lse, grad_value, stream); });
    }
  });
}

}  // namespace ssod::deform
