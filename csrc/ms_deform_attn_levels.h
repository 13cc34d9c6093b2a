// The pyramid as the threads of a CUDA block keep it in shared memory for multi-scale deformable attention.
#pragma once

#include "ms_deform_attn.h"
#include "team.h"

namespace ssod {

constexpr int kMaxLevels = 64;

// What the host knows of the levels, and where the device finds the rest.
struct LevelSource {
  const int64_t* shapes;  // (height, width) of each level on the device, or null: `sizes`
  const int64_t* starts;  // first tokens on the device, or null: levels follow each other
  int32_t sizes[2 * kMaxLevels];
  int32_t points[kMaxLevels];
  int32_t count;
  int32_t tokens;
};

template <typename T>
struct alignas(16) SampledLevel {
  PyramidLevel<int32_t> narrow;  // where `fits`
  int32_t row_width;             // of the level modulo 2^32
  T width_pixels, height_pixels;
  T share;                       // of a reference box that an offset of 1 spans
  int32_t first_sample, points;  // of the samples of a head
  bool fits;                     // inside of value, so that no corner needs a guard and 32 bits hold every token
  int64_t start, height, width;

  SSOD_HD int64_t size() const {  // wraps, for sizes that no memory holds
    return static_cast<int64_t>(static_cast<uint64_t>(height) * static_cast<uint64_t>(width));
  }
};

template <typename T>
SSOD_HD bool level_fits(const SampledLevel<T>& level, int64_t tokens) {
  const bool sizes = in_range<int64_t>(level.height, tokens + 1) & in_range<int64_t>(level.width, tokens + 1);
  return sizes && level.start >= 0 && level.start <= tokens - level.size();
}

// Fills levels[count]; a barrier at the end.
template <typename T, typename Team>
SSOD_HD void fill_levels(Team& team, const LevelSource& source, double offset_scale, SampledLevel<T>* levels) {
  for (int l = team.rank(); l < source.count; l += team.size()) {
    levels[l].height = source.shapes ? source.shapes[2 * l] : source.sizes[2 * l];
    levels[l].width = source.shapes ? source.shapes[2 * l + 1] : source.sizes[2 * l + 1];
    levels[l].row_width = static_cast<int32_t>(levels[l].width);
    levels[l].height_pixels = static_cast<T>(levels[l].height);
    levels[l].width_pixels = static_cast<T>(levels[l].width);
    levels[l].points = source.points[l];
    levels[l].share = offset_share<T>(offset_scale, source.points[l]);
  }
  team.sync();
  for (int l = team.rank(); l < source.count; l += team.size()) {
    uint64_t tokens = 0;
    int32_t samples = 0;
    for (int before = 0; before < l; ++before) {
      tokens += static_cast<uint64_t>(levels[before].size());
      samples += levels[before].points;
    }
    levels[l].start = source.starts ? source.starts[l] : static_cast<int64_t>(tokens);
    levels[l].first_sample = samples;
    levels[l].fits = level_fits(levels[l], source.tokens);
    levels[l].narrow = {static_cast<int32_t>(levels[l].start), static_cast<int32_t>(levels[l].height),
                        static_cast<int32_t>(levels[l].width)};
  }
  team.sync();
}

// Whether the levels, one after the other, hold exactly `tokens` tokens: queries of that number may be taken in strips.
template <typename T>
SSOD_HD bool levels_cover(const SampledLevel<T>* levels, int32_t count, int64_t tokens) {
  int64_t left = tokens;
  for (int l = 0; l < count; ++l) {
    const bool sizes = in_range<int64_t>(levels[l].height, left + 1) & in_range<int64_t>(levels[l].width, left + 1);
    if (!sizes || levels[l].size() > left) {
      return false;
    }
    left -= levels[l].size();
  }
  return left == 0;
}

}  // namespace ssod
