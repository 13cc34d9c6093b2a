// Inner loops of deformable attention over the channels of the pixels that samples read.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/halves.h"
#include "cpu/simd.h"
#include "ms_deform_attn.h"

namespace ssod {

// Samples of a tile as these loops read them. Corner c of sample i counts if bit c of inside[i] is set.
template <typename T, typename I>
struct SampleView {
  const I *row, *width;
  const int32_t* inside;
  const T *w00, *w01, *w10, *w11;
};

constexpr int32_t kAllInside = 15;

// Calls f(columns, vectors, lanes), with the last two as compile-time constants, for blocks that cover the channels: as
// wide as registers are, then narrower ones for the rest.
template <typename T, typename F>
SSOD_HD void for_each_block(int64_t channels, F&& f) {
  constexpr int kWide = 64 / sizeof(T);
  using std::integral_constant;
  int64_t c = 0;
  for (; channels - c >= 4 * kWide; c += 4 * kWide) {
    f(c, integral_constant<int, 4>{}, integral_constant<int, kWide>{});
  }
  if (channels - c >= 2 * kWide) {
    f(c, integral_constant<int, 2>{}, integral_constant<int, kWide>{});
    c += 2 * kWide;
  }
  if (channels - c >= kWide) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, kWide>{});
    c += kWide;
  }
  for (; channels - c >= 4; c += 4) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, 4>{});
  }
  for (; c < channels; ++c) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, 1>{});
  }
}

// Sum over samples [first, last) of kVectors * kLanes channels; `value` points at the first of them in row 0.
template <int kVectors, int kLanes, typename V, typename T, typename I>
SSOD_HD void sum_block(const V* value, int64_t stride, const SampleView<T, I>& s, int64_t first, int64_t last, T* out) {
  using Vector = typename Lanes<T, kLanes>::type;
  Vector total[kVectors] = {};
  for (int64_t i = first; i < last; ++i) {
    const V* above = value + s.row[i] * stride;
    const V* below = above + s.width[i] * stride;
    if (s.inside[i] == kAllInside) {
      for (int v = 0; v < kVectors; ++v) {
        Vector v00, v01, v10, v11;
        load_lanes<kLanes>(above + v * kLanes, v00);
        load_lanes<kLanes>(above + stride + v * kLanes, v01);
        load_lanes<kLanes>(below + v * kLanes, v10);
        load_lanes<kLanes>(below + stride + v * kLanes, v11);
        total[v] += (s.w00[i] * v00 + s.w01[i] * v01) + (s.w10[i] * v10 + s.w11[i] * v11);
      }
      continue;
    }
    const V* corners[] = {above, above + stride, below, below + stride};
    const T shares[] = {s.w00[i], s.w01[i], s.w10[i], s.w11[i]};
    for (int c = 0; c < 4; ++c) {
      for (int v = 0; v < kVectors && (s.inside[i] >> c & 1); ++v) {
        Vector pixel;
        load_lanes<kLanes>(corners[c] + v * kLanes, pixel);
        total[v] += shares[c] * pixel;
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    std::memcpy(out + v * kLanes, &total[v], sizeof(Vector));
  }
}

template <typename V, typename T, typename I>
struct BlockSum {
  const V* value;
  int64_t stride;
  const SampleView<T, I>& samples;
  int64_t first, last;
  T* out;

  template <typename Vectors, typename Width>
  SSOD_HD void operator()(int64_t c, Vectors, Width) const {
    sum_block<Vectors::value, Width::value>(value + c, stride, samples, first, last, out + c);
  }
};

// out[q] = sum over the `count` samples of query q; rows of `channels` numbers, out_stride apart.
template <typename V, typename T, typename I>
SSOD_CLONES static void sum_samples(const V* value, int64_t stride, int64_t channels, const SampleView<T, I> samples,
                                    int64_t queries, int64_t count, T* out, int64_t out_stride) {
  for (int64_t q = 0; q < queries; ++q) {
    for_each_block<T>(channels,
                      BlockSum<V, T, I>{value, stride, samples, q * count, (q + 1) * count, out + q * out_stride});
  }
}

}  // namespace ssod
