// Maths of one sample of multi-scale deformable attention, shared by the CPU and CUDA kernels.
//
// Order of operations and rules are those of ssod_fast/ops/_ms_deform_attn.py: positions decide which pixels are read,
// so they round alike on every backend. T is float, or double for float64 tensors. I is int64_t, or int32_t where the
// levels are known to lie inside of value (`guarded` false).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "boxes.h"

namespace ssod {

enum class SampleMethod : int64_t { bilinear, discrete };

// First token and size of one level of the pyramid.
template <typename I>
struct PyramidLevel {
  I start, height, width;
};

// The pixels that a sample reads: the corners (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1) are the tokens
// row, row + 1, row + width and row + width + 1. Bit c of `inside` says whether corner c counts; one that does not must
// not be read, multiplied by 0 neither.
template <typename T, typename I>
struct Footprint {
  I row;
  T fx, fy;
  int32_t inside;  // 0 for a sample that is not live
};

// Shares of the four corners.
template <typename T>
struct CornerShares {
  T w00, w01, w10, w11;
};

// Position in pixels, whose centres are integers, of a normalised location.
template <typename T>
SSOD_HD T pixel_position(T location, T size) {
  return location * size - T(0.5);
}

// Less than one pixel outside of the level; never for NaN.
template <typename T>
SSOD_HD bool is_live(T px, T py, T height, T width) {
  return (px > T(-1)) & (py > T(-1)) & (px < width) & (py < height);
}

// 0 <= i < size, for size >= 0.
template <typename I>
SSOD_HD bool in_range(I i, I size) {
  using U = std::make_unsigned_t<I>;
  return static_cast<U>(i) < static_cast<U>(size);
}

// start + y * width + x; wraps, for sizes that no memory holds.
template <typename I>
SSOD_HD I token_of(const PyramidLevel<I>& level, I y, I x) {
  using U = std::make_unsigned_t<I>;
  return static_cast<I>(static_cast<U>(level.start) + static_cast<U>(y) * static_cast<U>(level.width) +
                        static_cast<U>(x));
}

// Footprint of a bilinear sample at (px, py). `guarded` drops corners beyond the `tokens` rows of value, for sizes that
// nobody has checked.
template <bool guarded, typename T, typename I>
SSOD_HD Footprint<T, I> bilinear_footprint(T px, T py, const PyramidLevel<I>& level, I tokens) {
  const bool live = is_live(px, py, static_cast<T>(level.height), static_cast<T>(level.width));
  const T x = live ? px : T(0), y = live ? py : T(0);
  const T left = std::floor(x), top = std::floor(y);
  const I x0 = static_cast<I>(left), y0 = static_cast<I>(top);
  const bool in_x0 = in_range<I>(x0, level.width), in_x1 = in_range<I>(x0 + 1, level.width);
  const bool in_y0 = live & in_range<I>(y0, level.height), in_y1 = live & in_range<I>(y0 + 1, level.height);
  bool in00 = in_y0 & in_x0, in01 = in_y0 & in_x1, in10 = in_y1 & in_x0, in11 = in_y1 & in_x1;
  const I row = token_of<I>(level, y0, x0);
  if constexpr (guarded) {
    const I below = token_of<I>(level, y0 + 1, x0);
    in00 = in00 & in_range<I>(row, tokens);
    in01 = in01 & in_range<I>(row + 1, tokens);
    in10 = in10 & in_range<I>(below, tokens);
    in11 = in11 & in_range<I>(below + 1, tokens);
  }
  const int32_t inside = (in00 ? 1 : 0) | (in01 ? 2 : 0) | (in10 ? 4 : 0) | (in11 ? 8 : 0);
  return {row, x - left, y - top, inside};
}

// The pixel `position` (0..1 over the level) truncated to an integer and clamped to 0..size - 1; 0 for NaN.
template <typename T, typename I>
SSOD_HD I clamped_pixel(T position, I size) {
  const T pixel = positive(position * static_cast<T>(size) + T(0.5));
  const T last = static_cast<T>(size > 1 ? size - 1 : 0);
  return static_cast<I>(lower(pixel, last));
}

// Footprint of method "discrete" at a normalised location: one corner, no fractions. NaN reads nothing.
template <typename T, typename I>
SSOD_HD Footprint<T, I> discrete_footprint(T x, T y, const PyramidLevel<I>& level, I tokens) {
  const bool known = (x == x) & (y == y) & (level.width > 0) & (level.height > 0);
  const I row = token_of<I>(level, clamped_pixel<T, I>(y, level.height), clamped_pixel<T, I>(x, level.width));
  return {row, T(0), T(0), known & in_range<I>(row, tokens) ? 1 : 0};
}

// Bilinear shares times the weight of the sample.
template <typename T>
SSOD_HD CornerShares<T> corner_shares(T fx, T fy, T weight) {
  const T gx = T(1) - fx, gy = T(1) - fy;
  return {gy * gx * weight, gy * fx * weight, fy * gx * weight, fy * fx * weight};
}

// Gradients of a sample with respect to its position in pixels and to its weight.
template <typename T>
struct SampleGradient {
  T px, py, weight;
};

// From the dot products s_yx of the incoming gradient with the corners, 0 for a corner that does not count. All 0 for a
// sample of which no corner counts, whatever its weight.
template <typename T>
SSOD_HD SampleGradient<T> sample_gradient(T s00, T s01, T s10, T s11, T fx, T fy, T weight, bool any_inside) {
  const T gx = T(1) - fx, gy = T(1) - fy;
  const T px = ((s01 - s00) * gy + (s11 - s10) * fy) * weight;
  const T py = ((s10 - s00) * gx + (s11 - s01) * fx) * weight;
  const T sample = (gy * gx * s00 + gy * fx * s01) + (fy * gx * s10 + fy * fx * s11);
  return {any_inside ? px : T(0), any_inside ? py : T(0), any_inside ? sample : T(0)};
}

// grad * factor, and 0 where grad is 0: a sample that is not live has no gradient even where its factor is NaN.
template <typename T>
SSOD_HD T chained(T grad, T factor) {
  return grad == T(0) ? T(0) : grad * factor;
}

// Share of a reference box that an offset of 1 spans on a level of `points` samples.
template <typename T>
SSOD_HD T offset_share(double offset_scale, int64_t points) {
  return static_cast<T>(offset_scale) / static_cast<T>(points);
}

// Pixels per unit of offset along one axis, for a reference box of that (normalised) side.
template <typename T>
SSOD_HD T box_offset_scale(T share, T side, T size) {
  return share * side * size;
}

// d position / d side of the reference box.
template <typename T>
SSOD_HD T box_side_factor(T share, T offset, T size) {
  return share * offset * size;
}

// Position in pixels along one axis of an offset in pixels from a reference point.
template <typename T>
SSOD_HD T point_position(T reference, T offset, T size) {
  return reference * size + offset - T(0.5);
}

// The same from a reference box, with `scale` of box_offset_scale.
template <typename T>
SSOD_HD T box_position(T reference, T offset, T scale, T size) {
  return reference * size + offset * scale - T(0.5);
}

// Running maximum of logits that keeps NaN. Starts at minus infinity.
template <typename T>
SSOD_HD T logit_maximum(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// What the softmax subtracts from the logits: their maximum, but 0 where that is minus infinity, so that a row of
// nothing but minus infinity sums to 0. Its weights are then 0 / 0 and its log-sum-exp is minus infinity.
template <typename T>
SSOD_HD T softmax_shift(T maximum) {
  return maximum == minus_infinity<T>() ? T(0) : maximum;
}

// log(sum of exp(logits)) from the logarithm of the sum of exp(logits - shift).
template <typename T>
SSOD_HD T log_sum_exp(T maximum, T log_sum) {
  return maximum == -minus_infinity<T>() ? maximum : softmax_shift(maximum) + log_sum;
}

}  // namespace ssod
