// Gradients of multi-scale deformable attention: the blocks of the forward, which sample again. Gradients of samples
// have one owner each and are always the same bits; that of value is summed by atomics, by a kernel of its own with far
// fewer of them where queries are tokens, or in order where the caller asks for deterministic results.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/ms_deform_attn_ordered.cuh"
#include "cuda/ms_deform_attn_tiles.cuh"
#include "ms_deform_attn_rows_backward.h"

namespace ssod {
namespace {

using deform::Arguments;
using deform::kThreads;

constexpr int64_t kSharedProducts = 16 << 10;  // bytes per block; more of them are kept in global memory

template <typename Traits>
struct Problem {
  LevelSource levels;
  double offset_scale;
  RowSchedule schedule;
  BackwardInput<Traits> input;
  typename Traits::T* products;  // [B, Q, M, K], or null: in shared memory
};

// Where the rows of a block keep their products: one slice per row at work, or a slice of the global ones.
template <typename Traits>
__device__ typename Traits::T* products_of(const Problem<Traits>& p, const SampleRow& place, void* shared) {
  const int64_t samples = p.input.samples.samples;
  if (p.products) {
    return p.products + (place.row * p.input.samples.heads + place.head) * samples;
  }
  return static_cast<typename Traits::T*>(shared) + threadIdx.x / Traits::kLanes * samples;
}

template <bool fused, typename Traits>
__global__ void __launch_bounds__(kThreads, 4) attend_backward_kernel(const __grid_constant__ Problem<Traits> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ BoardOf<Traits> boards[kThreads / 32];
  auto* levels = reinterpret_cast<SampledLevel<typename Traits::T>*>(shared);
  BlockThreads block;
  fill_levels(block, p.levels, p.offset_scale, levels);
  const BlockRows rows = block_rows(p.schedule, blockIdx.x, levels, p.levels.count);
  LaneGroup<Traits::kLanes> group;
  for (int32_t i = threadIdx.x / Traits::kLanes; i < p.schedule.per_block; i += Traits::kRows) {
    const SampleRow place = scheduled_row(p.schedule, rows, i, levels);
    attend_row_backward<fused, Traits>(group, p.input, levels, place, boards[threadIdx.x / 32],
                                       fused ? products_of(p, place, levels + p.levels.count) : nullptr);
  }
}

// grad_reference [rows, width] from parts [rows, M, width], in the order of the heads.
template <typename T>
__global__ void sum_heads_kernel(const T* __restrict__ parts, T* __restrict__ out, int64_t count, int64_t width,
                                 int64_t heads) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) {
    const T* part = parts + i / width * heads * width + i % width;
    T sum = 0;
    for (int64_t head = 0; head < heads; ++head) {
      sum += part[head * width];
    }
    out[i] = sum;
  }
}

template <typename V>
__global__ void narrow_kernel(const float* __restrict__ from, V* __restrict__ to, int64_t count) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
  if (i + 4 <= count) {
    float parts[4];
    VectorMemory::load_if<4>(true, from + i, parts);
    VectorMemory::store<4>(to + i, parts);
  } else {
    for (int64_t j = i; j < count; ++j) {
      to[j] = narrow<V>(from[j]);
    }
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, 256)); }

// How the gradient of value is summed; `best` of atomics and tiles.
enum class Summation : int64_t { best, atomics, tiles, ordered };

Summation summation_of(bool deterministic) { return deterministic ? Summation::ordered : Summation::best; }

// What is asked for, and where it goes.
struct Gradients {
  Tensor grad_output;
  std::optional<Tensor> lse;
  Summation summation;
  Tensor value, positions, weights;
  std::optional<Tensor> reference_parts;  // [B, Q, M, Lr, 2 or 4]
};

template <typename T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

template <typename Traits>
BackwardInput<Traits> make_input(const Arguments& a, const Gradients& g, void* grad_value) {
  using T = typename Traits::T;
  using V = typename Traits::V;
  return {deform::make_sample_input<T>(a),
          deform::make_token_rows<V>(a.value),
          static_cast<const V*>(g.grad_output.data_ptr()),
          data_or_null<const T>(g.lse),
          {static_cast<T*>(grad_value), a.tokens() * a.heads() * a.channels(), data_or_null<T>(g.reference_parts),
           any_floats(g.positions, 0), any_floats(g.weights, 0)}};
}

// Gradients of all samples; that of value is added to `grad_value`, or left out where that is null.
template <typename Traits>
void launch(const Arguments& a, const Gradients& g, void* grad_value, cudaStream_t stream) {
  using T = typename Traits::T;
  const int64_t product_bytes = g.lse ? Traits::kRows * a.samples() * sizeof(T) : 0;
  std::optional<Tensor> products;
  if (product_bytes > kSharedProducts) {
    const auto dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    products = new_cuda_output(a.value, {a.rows() * a.samples()}, dtype);
  }
  const Problem<Traits> p{deform::make_level_source(a), a.offset_scale, deform::schedule_for<Traits>(a),
                          make_input<Traits>(a, g, grad_value), data_or_null<T>(products)};
  const size_t bytes = a.levels() * sizeof(SampledLevel<T>) + (products ? 0 : product_bytes);
  const auto kernel = g.lse ? attend_backward_kernel<true, Traits> : attend_backward_kernel<false, Traits>;
  kernel<<<deform::blocks_of(a, p.schedule), kThreads, bytes, stream>>>(p);
  check_launch("ms_deform_attn_backward");
}

template <typename V>
void launch_rows(const Arguments& a, const Gradients& g, void* grad_value, cudaStream_t stream) {
  const bool aligned =
      deform::heads_aligned(a.value, 16) && reinterpret_cast<uintptr_t>(g.grad_output.data_ptr()) % 16 == 0;
  deform::with_lanes<V>(a, aligned, [&](auto traits) { launch<decltype(traits)>(a, g, grad_value, stream); });
}

void clear(const Tensor& t, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(t.data_ptr(), 0, t.numel() * t.element_size(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn_backward: ", cudaGetErrorString(error));
}

bool takes_tiles(const Arguments& a, const Gradients& g) {
  if (g.summation == Summation::atomics || !deform::tiles_fit(a, g.grad_output)) {
    STD_TORCH_CHECK(g.summation != Summation::tiles, "ms_deform_attn_backward: no tiles of these arguments");
    return false;
  }
  return g.summation == Summation::tiles || deform::tiles_pay(a);
}

// Sums in the compute type, which is rounded once.
template <typename V>
void launch_atomic(const Arguments& a, const Gradients& g, cudaStream_t stream) {
  constexpr bool kNarrow = sizeof(V) == 2;
  const int64_t bytes = a.heads() * a.channels() * int64_t{sizeof(WideOf<V>)};
  STD_TORCH_CHECK(bytes <= std::numeric_limits<uint32_t>::max(), "ms_deform_attn_backward: sums of a token take ",
                  bytes, " bytes, at most 2^32 - 1 on CUDA");
  Tensor sums = kNarrow ? new_cuda_output(a.value, first_sizes(a.value, 4), ScalarType::Float) : g.value;
  if (sums.numel() > 0) {
    clear(sums, stream);
  }
  if (a.rows() > 0) {
    const bool tiles = takes_tiles(a, g);
    launch_rows<V>(a, g, tiles ? nullptr : sums.data_ptr(), stream);
    if (tiles) {
      deform::sum_in_tiles(a, g.grad_output, g.lse, static_cast<float*>(sums.data_ptr()), stream);
    }
  }
  if constexpr (kNarrow) {
    if (const int64_t count = sums.numel()) {
      narrow_kernel<<<blocks_for(ceil_div(count, 4)), 256, 0, stream>>>(static_cast<const float*>(sums.data_ptr()),
                                                                        static_cast<V*>(g.value.data_ptr()), count);
      check_launch("ms_deform_attn_backward");
    }
  }
}

template <typename V>
void launch_ordered(const Arguments& a, const Gradients& g, cudaStream_t stream) {
  if (a.rows() > 0) {
    launch_rows<V>(a, g, nullptr, stream);
  }
  if (g.value.numel() > 0) {
    deform::sum_in_order<V>(a, g.grad_output, g.lse, g.value, stream);
  }
}

void run(const Arguments& a, const Gradients& g, cudaStream_t stream) {
  deform::with_value_type(a.value, [&](auto v) {
    using V = decltype(v);
    g.summation == Summation::ordered ? launch_ordered<V>(a, g, stream) : launch_atomic<V>(a, g, stream);
  });
}

// Fresh gradients of the samples and of value.
Gradients make_gradients(const Arguments& a, const Tensor& grad_output, std::optional<Tensor> lse,
                         Summation summation) {
  return {grad_output,
          lse,
          summation,
          new_cuda_output(a.value, first_sizes(a.value, 4), a.value.scalar_type()),
          new_cuda_output(a.positions, first_sizes(a.positions, 5), a.positions.scalar_type()),
          new_cuda_output(a.weights, first_sizes(a.weights, 4), a.weights.scalar_type()),
          std::nullopt};
}

Tensor sum_heads(const Tensor& parts, const Tensor& reference, cudaStream_t stream) {
  Tensor out = new_cuda_output(reference, first_sizes(reference, 4), reference.scalar_type());
  const int64_t count = out.numel(), width = reference.size(2) * reference.size(3), heads = parts.size(2);
  if (count > 0) {
    deform::with_value_type(reference, [&](auto v) {
      using T = WideOf<decltype(v)>;
      sum_heads_kernel<<<blocks_for(count), 256, 0, stream>>>(static_cast<const T*>(parts.data_ptr()),
                                                              static_cast<T*>(out.data_ptr()), count, width, heads);
    });
    check_launch("ms_deform_attn_fused_backward");
  }
  return out;
}

// Gradients of value, references (empty where they are not wanted), positions and weights.
using AllGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

AllGradients gradients_of(const Arguments& a, const Tensor& grad_output, std::optional<Tensor> lse, bool of_reference,
                          Summation summation, cudaStream_t stream) {
  Gradients g = make_gradients(a, grad_output, lse, summation);
  const Tensor& like = a.reference ? *a.reference : a.value;
  if (of_reference) {
    g.reference_parts =
        new_cuda_output(like, {a.images(), a.queries(), a.heads(), like.size(2), like.size(3)}, like.scalar_type());
  }
  run(a, g, stream);
  Tensor grad_reference =
      of_reference ? sum_heads(*g.reference_parts, like, stream) : new_cuda_output(like, {0}, like.scalar_type());
  return {g.value, grad_reference, g.positions, g.weights};
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(Tensor grad_output, Tensor value,
                                                           std::optional<Tensor> spatial_shapes,
                                                           std::optional<Tensor> level_start_index,
                                                           Tensor sampling_locations, Tensor attention_weights,
                                                           deform::Sizes shapes_hw, deform::Sizes num_points,
                                                           int64_t method, bool deterministic) {
  const DeviceScope device(value);
  const Arguments a{value,        spatial_shapes,     level_start_index,
                    std::nullopt, sampling_locations, attention_weights,
                    shapes_hw,    num_points,         method,
                    0.0};
  auto [grad_value, none, grad_locations, grad_weights] =
      gradients_of(a, grad_output, std::nullopt, false, summation_of(deterministic), device.stream());
  return {grad_value, grad_locations, grad_weights};
}

AllGradients ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, std::optional<Tensor> spatial_shapes,
                                           std::optional<Tensor> level_start_index, Tensor reference_points,
                                           Tensor sampling_offsets, Tensor attention_logits, deform::Sizes shapes_hw,
                                           deform::Sizes num_points, double offset_scale, Tensor lse,
                                           bool need_reference_grad, bool deterministic) {
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
  return gradients_of(a, grad_output, lse, need_reference_grad, summation_of(deterministic), device.stream());
}

// Both of them with a Summation of the caller's choice, of the fused op where there are references: for tests and
// benchmarks, which compare them.
AllGradients ms_deform_attn_backward_by(Tensor grad_output, Tensor value, std::optional<Tensor> spatial_shapes,
                                        std::optional<Tensor> level_start_index, std::optional<Tensor> reference,
                                        Tensor positions, Tensor weights, deform::Sizes shapes_hw,
                                        deform::Sizes num_points, int64_t method, double offset_scale,
                                        std::optional<Tensor> lse, int64_t summation) {
  STD_TORCH_CHECK(summation >= 0 && summation <= static_cast<int64_t>(Summation::ordered),
                  "summation must be 0 to 3, got ", summation);
  const DeviceScope device(value);
  const Arguments a{value,   spatial_shapes, level_start_index, reference, positions,
                    weights, shapes_hw,      num_points,        method,    offset_scale};
  return gradients_of(a, grad_output, lse, reference.has_value(), static_cast<Summation>(summation), device.stream());
}

STABLE_TORCH_LIBRARY_FRAGMENT(ssod_fast, m) {
  m.def(
      "_ms_deform_attn_backward_by(Tensor grad_output, Tensor value, Tensor? spatial_shapes, "
      "Tensor? level_start_index, Tensor? reference, Tensor positions, Tensor weights, SymInt[]? shapes_hw, "
      "int[]? num_points, int method, float offset_scale, Tensor? lse, int summation) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
  m.impl("_ms_deform_attn_backward_by", TORCH_BOX(&ms_deform_attn_backward_by));
}

}  // namespace
}  // namespace ssod
