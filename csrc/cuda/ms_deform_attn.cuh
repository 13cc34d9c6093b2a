// Arguments of the ops of multi-scale deformable attention as their kernels take them, and the choice of the lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <optional>

#include "cuda/floats.cuh"
#include "cuda/lane_group.cuh"
#include "ms_deform_attn_rows.h"
#include "ms_deform_attn_schedule.h"

namespace ssod::deform {

constexpr int kThreads = 128;
constexpr int64_t kFewThreadsPerProcessor = 512;  // work that leaves processors idle takes more lanes per row

using Sizes = std::optional<std::vector<int64_t>>;

// How kLanes lanes of a warp share the channels of a row; see csrc/ms_deform_attn_rows.h.
template <typename Value, int lanes, int vector, bool exact>
struct LaneTraits {
  using T = WideOf<Value>;
  using V = Value;
  static constexpr int kLanes = lanes, kVector = vector;
  static constexpr bool kExact = exact;
  static constexpr int kRows = kThreads / lanes;  // that a block works on at once
  using Floats = AnyFloats;
  using Memory = VectorMemory;
};

// The inputs of the plain and of the fused op; the latter has a reference.
struct Arguments {
  Tensor value;
  std::optional<Tensor> spatial_shapes, level_start_index, reference;
  Tensor positions, weights;
  Sizes shapes_hw, num_points;
  int64_t method;
  double offset_scale;

  int64_t images() const { return value.size(0); }
  int64_t tokens() const { return value.size(1); }
  int64_t heads() const { return value.size(2); }
  int64_t channels() const { return value.size(3); }
  int64_t queries() const { return weights.size(1); }
  int64_t samples() const { return weights.size(3); }
  int64_t rows() const { return images() * queries() * heads(); }
  int64_t levels() const { return shapes_hw ? static_cast<int64_t>(shapes_hw->size()) / 2 : spatial_shapes->size(0); }
  int64_t points(int64_t level) const { return num_points ? (*num_points)[level] : samples() / levels(); }
};

inline LevelSource make_level_source(const Arguments& a) {
  constexpr int64_t kMaximum = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(a.levels() <= kMaxLevels, "ms_deform_attn: at most ", kMaxLevels, " levels on CUDA, got ",
                  a.levels());
  STD_TORCH_CHECK(a.tokens() < kMaximum, "ms_deform_attn: fewer than 2^31 - 1 tokens, got ", a.tokens());
  LevelSource source{};
  source.count = static_cast<int32_t>(a.levels());
  source.tokens = static_cast<int32_t>(a.tokens());
  if (a.level_start_index) {
    source.starts = static_cast<const int64_t*>(a.level_start_index->data_ptr());
  }
  if (!a.shapes_hw) {
    source.shapes = static_cast<const int64_t*>(a.spatial_shapes->data_ptr());
  }
  for (int64_t l = 0; l < a.levels(); ++l) {
    source.points[l] = static_cast<int32_t>(a.points(l));
    for (int64_t i = 2 * l; a.shapes_hw && i < 2 * l + 2; ++i) {
      source.sizes[i] = static_cast<int32_t>(std::min((*a.shapes_hw)[i], kMaximum));  // larger: of an empty level
    }
  }
  return source;
}

// 1 / samples per level where all levels have as many and float32 divides exactly enough, else 0.
inline float levels_per_sample(const Arguments& a) {
  const int64_t points = a.levels() > 0 ? a.points(0) : 0;
  bool equal = points > 0 && a.samples() < (1 << 20);
  for (int64_t l = 1; l < a.levels(); ++l) {
    equal = equal && a.points(l) == points;
  }
  return equal ? 1.0f / static_cast<float>(points) : 0.0f;
}

// Elements from one row (image, query) to the next; strides of dimensions of size 1 are arbitrary.
inline int64_t query_stride(const Tensor& t) { return t.size(1) == 1 ? t.stride(0) : t.stride(1); }

template <typename T>
SampleInput<T, AnyFloats> make_sample_input(const Arguments& a) {
  const int64_t position_stride = query_stride(a.positions), weight_stride = query_stride(a.weights);
  SampleInput<T, AnyFloats> in{any_floats(a.positions, position_stride), any_floats(a.weights, weight_stride),
                               position_stride, weight_stride};
  if (a.reference) {
    in.reference = static_cast<const T*>(a.reference->data_ptr());
    in.reference_levels = static_cast<int32_t>(a.reference->size(2));
    in.reference_size = static_cast<int32_t>(a.reference->size(3));
  }
  in.heads = static_cast<int32_t>(a.heads());
  in.samples = static_cast<int32_t>(a.samples());
  in.levels = static_cast<int32_t>(a.levels());
  in.levels_per_sample = levels_per_sample(a);
  in.method = static_cast<SampleMethod>(a.method);
  return in;
}

inline int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

template <typename V>
TokenRows<V> make_token_rows(const Tensor& value) {
  const int64_t bytes = stride_of(value, 1) * sizeof(V);
  STD_TORCH_CHECK(bytes <= std::numeric_limits<uint32_t>::max(), "ms_deform_attn: tokens of value are ", bytes,
                  " bytes apart, at most 2^32 - 1 on CUDA");
  return {static_cast<const V*>(value.data_ptr()), stride_of(value, 0), static_cast<uint32_t>(bytes),
          static_cast<int32_t>(value.size(1)), static_cast<int32_t>(value.size(3))};
}

// Whether every head of every token begins at a multiple of `bytes`.
inline bool heads_aligned(const Tensor& value, int64_t bytes) {
  const int64_t size = value.element_size();
  const int64_t elements = value.size(3) | stride_of(value, 0) | stride_of(value, 1);
  return reinterpret_cast<uintptr_t>(value.data_ptr()) % bytes == 0 && elements * size % bytes == 0;
}

inline bool leaves_processors_idle(const Arguments& a, int64_t lanes) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.value.get_device_index());
  return a.rows() * lanes < processors * kFewThreadsPerProcessor;
}

// Calls f with the LaneTraits for rows of these channels: 16 bytes per lane, fewer where there is little work, or any
// number of channels in slabs, one channel per lane where rows are not `aligned` to 16 bytes.
template <typename V, typename F>
void with_lanes(const Arguments& a, bool aligned, F&& f) {
  constexpr int kWide = 16 / sizeof(V);
  const int64_t channels = a.channels();
  if constexpr (std::is_same_v<V, double>) {
    f(LaneTraits<V, 8, 1, false>{});
  } else if (!aligned) {
    f(LaneTraits<V, 8, 1, false>{});
  } else if (channels == 16) {
    leaves_processors_idle(a, 16 / kWide) ? f(LaneTraits<V, 8, 2, true>{})
                                          : f(LaneTraits<V, 16 / kWide, kWide, true>{});
  } else if (channels == 32) {
    leaves_processors_idle(a, 32 / kWide) ? f(LaneTraits<V, 16, 2, true>{})
                                          : f(LaneTraits<V, 32 / kWide, kWide, true>{});
  } else if (channels == 64) {
    f(LaneTraits<V, 64 / kWide, kWide, true>{});
  } else {
    f(LaneTraits<V, 8, kWide, false>{});
  }
}

// Calls f with a value of the C++ type of a tensor's elements.
template <typename F>
void with_value_type(const Tensor& value, F&& f) {
  switch (value.scalar_type()) {
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Double:
      return f(double{});
    default:
      return f(float{});
  }
}

template <typename Traits>
RowSchedule schedule_for(const Arguments& a) {
  return make_row_schedule(a.images(), a.queries(), a.heads(), a.tokens(), Traits::kRows);
}

inline unsigned blocks_of(const Arguments& a, const RowSchedule& schedule) {
  constexpr int64_t kMaximum = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(a.queries() <= kMaximum && schedule.blocks() <= kMaximum,
                  "ms_deform_attn: too many queries: ", a.queries(), " under ", a.heads(), " heads of ", a.images(),
                  " images");
  return static_cast<unsigned>(schedule.blocks());
}

}  // namespace ssod::deform
