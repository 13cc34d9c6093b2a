// Which source pixels the output positions of one axis read: tables made once per placement.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bilinear.h"

namespace ssod {

// The source indices that n output positions of one axis read, tap by tap: index[tap * n + i].
struct Axis {
  int taps = 1;         // 1: no weights; 2: linear, weight[i] is that of the second tap; more: weight[tap * n + i]
  bool linear = false;  // two taps with one weight
  int64_t n = 0;
  int32_t first = 0, last = 0;  // range of source indices, inclusive
  bool run = false;             // the indices simply count up: nothing to resample
  std::vector<int32_t> index;
  std::vector<float> weight;

  int32_t at(int tap, int64_t i) const { return index[tap * n + i]; }
  float weight_at(int tap, int64_t i) const { return weight[tap * n + i]; }
};

// Position inside the resized source of canvas position begin + i, the flip undone.
struct Local {
  int32_t begin, offset, out_size;
  bool flip;

  int32_t operator()(int64_t i) const {
    const int32_t u = begin + static_cast<int32_t>(i) - offset;
    return flip ? out_size - 1 - u : u;
  }
};

inline void fill_nearest(Axis& axis, const Local& local, float inv, int32_t size) {
  axis.index.resize(axis.n);
  for (int64_t i = 0; i < axis.n; ++i) axis.index[i] = nearest_index(local(i), inv, size);
}

inline void fill_linear(Axis& axis, const Local& local, float inv, int32_t size) {
  axis.taps = 2;
  axis.linear = true;
  axis.index.resize(2 * axis.n);
  axis.weight.resize(axis.n);
  for (int64_t i = 0; i < axis.n; ++i) {
    const LinearTap tap = linear_tap(local(i), inv, size);
    axis.index[i] = tap.i0;
    axis.index[axis.n + i] = tap.i1;
    axis.weight[i] = tap.t;
  }
}

inline void fill_triangle(Axis& axis, const Local& local, float inv, int32_t size) {
  std::vector<TriangleTap> taps(axis.n);
  axis.taps = 1;
  for (int64_t i = 0; i < axis.n; ++i) {
    taps[i] = triangle_tap(local(i), inv, size);
    axis.taps = std::max(axis.taps, taps[i].end - taps[i].begin);
  }
  axis.index.resize(axis.taps * axis.n);
  axis.weight.assign(axis.taps * axis.n, 0.0f);
  for (int64_t i = 0; i < axis.n; ++i) {
    float total = 0.0f;
    for (int32_t j = taps[i].begin; j < taps[i].end; ++j) total += taps[i].weight(j);
    for (int tap = 0; tap < axis.taps; ++tap) {
      // Unused taps repeat the last one with weight 0, so that a NaN reaches only the pixels that read it.
      const int32_t j = taps[i].begin + tap;
      axis.index[tap * axis.n + i] = std::min(j, taps[i].end - 1);
      if (j < taps[i].end) axis.weight[tap * axis.n + i] = taps[i].weight(j) / total;
    }
  }
}

inline bool counts_up(const Axis& axis) {
  for (int64_t i = 1; i < axis.n; ++i) {
    if (axis.index[i] != axis.index[0] + i) return false;
  }
  return true;
}

inline Axis make_axis(int64_t n, const Local& local, float inv, int32_t size, Interp interp) {
  Axis axis;
  axis.n = n;
  const bool same_size = inv == 1.0f && local.out_size <= size;  // every rule then reads exactly one pixel
  if (interp == Interp::kNearest || same_size) {
    fill_nearest(axis, local, inv, size);
  } else if (interp == Interp::kBilinear || inv <= 1.0f) {
    fill_linear(axis, local, inv, size);
  } else {
    fill_triangle(axis, local, inv, size);
  }
  const auto [low, high] = std::minmax_element(axis.index.begin(), axis.index.end());
  axis.first = *low;
  axis.last = *high;
  axis.run = axis.taps == 1 && counts_up(axis);
  return axis;
}

}  // namespace ssod
