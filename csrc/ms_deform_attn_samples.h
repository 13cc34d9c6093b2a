// One sample of multi-scale deformable attention as the lane that owns it sees it, and as it is shown to the lanes that
// read its corners.
#pragma once

#include "ms_deform_attn_levels.h"

namespace ssod {

// Inputs of the plain op, and with `reference` those of the fused one. Floats is a tensor of some float type:
//   T load<T>(i), void load_pair(i, x, y)      element i; elements i and i + 1, i even;
//   Floats from(i)                             the same from element i on.
template <typename T, typename Floats>
struct SampleInput {
  Floats positions;                        // [rows, M, K, 2] locations or offsets
  Floats weights;                          // [rows, M, K] weights or logits
  int64_t position_stride, weight_stride;  // between rows (image, query)
  const T* reference;                      // [rows, reference_levels, reference_size]
  int32_t reference_levels, reference_size;
  int32_t heads, samples, levels;
  float levels_per_sample;  // where all levels have the same number of samples, else 0
  SampleMethod method;
};

// A query of an image under a head; `active` false repeats another one and writes nothing.
struct SampleRow {
  int64_t row;  // image * queries + query
  int32_t image, head;
  bool active;
};

// The inputs of one row.
template <typename T, typename Floats>
struct RowInput {
  Floats positions, weights;
  const T* reference;
};

template <typename T, typename Floats>
SSOD_HD RowInput<T, Floats> row_input(const SampleInput<T, Floats>& in, const SampleRow& place) {
  const int64_t first = int64_t{place.head} * in.samples;
  return {in.positions.from(place.row * in.position_stride + 2 * first),
          in.weights.from(place.row * in.weight_stride + first),
          in.reference + place.row * in.reference_levels * in.reference_size};
}

template <typename T>
struct OwnSample {
  Footprint<T, int32_t> at;
  int32_t row_width;  // tokens from one row of the level to the next
  T width, height;    // of the level
  T offset_x, offset_y;
  T scale_x, scale_y;  // d position / d offset
  T weight;
  int32_t level;
  bool real;  // false: there is no such sample
};

template <typename T, typename Floats>
SSOD_HD int32_t level_of_sample(const SampleInput<T, Floats>& in, const SampledLevel<T>* levels, int32_t k) {
  if (in.levels_per_sample > 0.0f) {
    return static_cast<int32_t>((static_cast<float>(k) + 0.5f) * in.levels_per_sample);
  }
  int32_t level = 0;
  while (k >= levels[level].first_sample + levels[level].points) {
    ++level;
  }
  return level;
}

// Guards are for levels that only the device knows and that do not fit value.
template <typename T>
SSOD_HD Footprint<T, int32_t> guarded_footprint(T px, T py, const SampledLevel<T>& level, int32_t tokens) {
  if (level.fits) {
    return bilinear_footprint<false>(px, py, level.narrow, tokens);
  }
  const PyramidLevel<int64_t> wide{level.start, level.height, level.width};
  const auto at = bilinear_footprint<true, T, int64_t>(px, py, wide, tokens);
  return {static_cast<int32_t>(at.row), at.fx, at.fy, at.inside};  // corners inside are found again modulo 2^32
}

template <typename T>
SSOD_HD Footprint<T, int32_t> nearest_footprint(T x, T y, const SampledLevel<T>& level, int32_t tokens) {
  const PyramidLevel<int64_t> wide{level.start, level.height, level.width};
  const auto at = discrete_footprint<T, int64_t>(x, y, wide, tokens);
  return {static_cast<int32_t>(at.row), at.fx, at.fy, at.inside};
}

// Position of a fused sample around its reference, a point or a box.
template <typename T, typename Floats>
SSOD_HD void fused_position(const SampleInput<T, Floats>& in, const RowInput<T, Floats>& row,
                            const SampledLevel<T>& level, OwnSample<T>& own, T& px, T& py) {
  const T* reference = row.reference + (in.reference_levels == 1 ? 0 : own.level) * in.reference_size;
  own.scale_x = own.scale_y = T(1);
  if (in.reference_size == 2) {
    px = point_position(reference[0], own.offset_x, own.width);
    py = point_position(reference[1], own.offset_y, own.height);
  } else {
    own.scale_x = box_offset_scale(level.share, reference[2], own.width);
    own.scale_y = box_offset_scale(level.share, reference[3], own.height);
    px = box_position(reference[0], own.offset_x, own.scale_x, own.width);
    py = box_position(reference[1], own.offset_y, own.scale_y, own.height);
  }
}

// Sample k of a row, without its weight.
template <bool fused, typename T, typename Floats>
SSOD_HD OwnSample<T> locate_sample(const SampleInput<T, Floats>& in, const RowInput<T, Floats>& row,
                                   const SampledLevel<T>* levels, int32_t tokens, int32_t k) {
  OwnSample<T> own{};
  own.real = true;
  own.level = level_of_sample(in, levels, k);
  const SampledLevel<T>& level = levels[own.level];
  own.width = level.width_pixels;
  own.height = level.height_pixels;
  own.row_width = level.row_width;
  row.positions.load_pair(2 * k, own.offset_x, own.offset_y);
  if constexpr (fused) {
    T px, py;
    fused_position(in, row, level, own, px, py);
    own.at = guarded_footprint(px, py, level, tokens);
  } else if (in.method == SampleMethod::bilinear) {
    const T px = pixel_position(own.offset_x, own.width), py = pixel_position(own.offset_y, own.height);
    own.at = guarded_footprint(px, py, level, tokens);
  } else {
    own.at = nearest_footprint(own.offset_x, own.offset_y, level, tokens);
  }
  return own;
}

// Sample k of a row with its weight, that of the fused op from the log-sum-exps lse [rows, M].
template <bool fused, typename T, typename Floats>
SSOD_HD OwnSample<T> weighted_sample(const SampleInput<T, Floats>& in, const T* lse, const SampledLevel<T>* levels,
                                     int32_t tokens, const SampleRow& place, int32_t k) {
  const RowInput<T, Floats> row = row_input(in, place);
  auto own = locate_sample<fused>(in, row, levels, tokens, k);
  own.weight = row.weights.template load<T>(k);
  if constexpr (fused) {
    own.weight = std::exp(own.weight - lse[place.row * in.heads + place.head]);
  }
  return own;
}

// Tokens of the four corners of a sample, -1 for one that does not count, and their shares, 0 for such a one.
template <typename T>
struct alignas(16) CornerRows {
  int32_t row[4];
};

template <typename T>
struct alignas(16) CornerWeights {
  T share[4];
};

// Samples of the groups of one warp, kLanes per group, placed so that neither the lanes that write their own nor the
// groups that read one each meet in a bank.
template <typename T, int kLanes>
struct SampleBoard {
  static constexpr int kGroups = 32 / kLanes;
  static constexpr int kPadding = kLanes == 32 ? 0 : kLanes < 8 ? 8 / kLanes : 1;
  static constexpr int kStride = kGroups + kPadding;

  CornerRows<T> rows[kLanes * kStride];
  CornerWeights<T> shares[kLanes * kStride];

  SSOD_HD static int slot(int group, int sample) { return sample * kStride + group; }

  SSOD_HD void put(int group, int sample, const OwnSample<T>& own) {
    const auto width = static_cast<uint32_t>(own.row_width), row = static_cast<uint32_t>(own.at.row);
    const uint32_t tokens[4] = {row, row + 1, row + width, row + width + 1};
    const CornerShares<T> all = corner_shares(own.at.fx, own.at.fy, own.weight);
    const T share[4] = {all.w00, all.w01, all.w10, all.w11};
    CornerRows<T> shown_rows;
    CornerWeights<T> shown_shares;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool counts = own.at.inside >> c & 1;
      shown_rows.row[c] = counts ? static_cast<int32_t>(tokens[c]) : -1;
      shown_shares.share[c] = counts ? share[c] : T(0);
    }
    rows[slot(group, sample)] = shown_rows;
    shares[slot(group, sample)] = shown_shares;
  }
};

}  // namespace ssod
