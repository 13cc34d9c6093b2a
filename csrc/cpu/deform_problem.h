// One call of a deformable attention op, whatever its dtypes: sizes, views of the tensors, and the levels.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/halves.h"
#include "cpu/outputs.h"
#include "ms_deform_attn.h"

namespace ssod {

using OptionalTensor = std::optional<Tensor>;
using OptionalInts = std::optional<std::vector<int64_t>>;

// value [B, S, M, C]; C is dense and heads lie C apart unless they are packed otherwise.
struct ValueView {
  const void* data;
  ScalarType dtype;
  int64_t image_stride, token_stride, head_stride;
};

// One row of M * K numbers, or pairs of numbers, per (image, query).
struct RowView {
  const void* data;
  ScalarType dtype;
  int64_t stride;
};

struct LevelRow {
  PyramidLevel<int64_t> level;
  int64_t points;
};

// Reference points [B, Q, levels, numbers] in the dtype of the maths; no numbers for the plain op.
struct ReferenceView {
  const void* data;
  int64_t levels, numbers;  // L or 1; 2 or 4
};

struct DeformProblem {
  int64_t batch, tokens, heads, channels, queries, samples;
  ValueView value;
  RowView positions;  // locations or offsets
  RowView weights;    // weights or logits
  ReferenceView reference;
  double offset_scale;
  bool discrete;
  std::vector<LevelRow> levels;

  bool fused() const { return reference.numbers > 0; }
  bool is_double() const { return value.dtype == ScalarType::Double; }
};

// Calls f with `data` as a pointer to its dtype.
template <typename F>
void with_floats(const void* data, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::Half:
      return f(static_cast<const Half*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(data));
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: dtype must be float32, float16 or bfloat16, or float64 for all tensors");
  }
}

// The same for maths in T: double has tensors of double alone.
template <typename T, typename F>
void with_numbers(const void* data, ScalarType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    STD_TORCH_CHECK(dtype == ScalarType::Double, "ms_deform_attn: float64 value needs float64 samples");
    f(static_cast<const double*>(data));
  } else {
    with_floats(data, dtype, f);
  }
}

// Strides of dimensions of one element are arbitrary: rows (b, q) lie at the stride of q, or of b where there is one q.
inline RowView row_view(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type(), t.size(1) == 1 ? t.stride(0) : t.stride(1)};
}

inline std::vector<LevelRow> read_levels(const OptionalTensor& spatial_shapes, const OptionalTensor& level_start_index,
                                         const OptionalInts& shapes_hw, const OptionalInts& num_points,
                                         int64_t samples) {
  STD_TORCH_CHECK(shapes_hw || spatial_shapes, "ms_deform_attn: needs spatial_shapes or shapes_hw");
  const int64_t* hw = shapes_hw ? shapes_hw->data() : static_cast<const int64_t*>(spatial_shapes->data_ptr());
  const int64_t* starts = level_start_index ? static_cast<const int64_t*>(level_start_index->data_ptr()) : nullptr;
  const int64_t count = shapes_hw ? static_cast<int64_t>(shapes_hw->size()) / 2 : spatial_shapes->size(0);
  std::vector<LevelRow> levels(count);
  uint64_t next = 0;  // unsigned: sizes may be anything, and wrap
  for (int64_t l = 0; l < count; ++l) {
    const int64_t start = starts ? starts[l] : static_cast<int64_t>(next);
    levels[l] = {{start, hw[2 * l], hw[2 * l + 1]}, num_points ? (*num_points)[l] : samples / count};
    next += static_cast<uint64_t>(hw[2 * l]) * static_cast<uint64_t>(hw[2 * l + 1]);
  }
  return levels;
}

// Whether every level lies inside of value and its tokens fit int32: then no corner needs a check of its row.
inline bool levels_fit(const DeformProblem& p) {
  if (p.tokens > INT32_MAX) {
    return false;
  }
  return std::all_of(p.levels.begin(), p.levels.end(), [&](const LevelRow& row) {
    const auto [start, height, width] = row.level;
    const bool sized = height >= 0 && width >= 0 && height <= p.tokens && width <= p.tokens;
    return sized && start >= 0 && start <= p.tokens && height * width <= p.tokens - start;
  });
}

inline DeformProblem make_problem(const Tensor& value, const OptionalTensor& spatial_shapes,
                                  const OptionalTensor& level_start_index, const Tensor& positions,
                                  const Tensor& weights, const OptionalInts& shapes_hw,
                                  const OptionalInts& num_points) {
  const int64_t samples = weights.size(3);
  return {value.size(0),
          value.size(1),
          value.size(2),
          value.size(3),
          weights.size(1),
          samples,
          {value.data_ptr(), value.scalar_type(), value.stride(0), value.stride(1), value.size(3)},
          row_view(positions),
          row_view(weights),
          {nullptr, 0, 0},
          0,
          false,
          read_levels(spatial_shapes, level_start_index, shapes_hw, num_points, samples)};
}

inline ReferenceView reference_view(const Tensor& points) {
  return {points.data_ptr(), points.size(2), points.size(3)};
}

// float64 for float64, else float32.
inline ScalarType maths_dtype(const DeformProblem& p) { return p.is_double() ? ScalarType::Double : ScalarType::Float; }

}  // namespace ssod
