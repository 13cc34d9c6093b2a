// The box codec, one axis at a time, shared by the CPU and CUDA kernels. The order of operations is that of
// ssod_fast/ops/box_deltas.py.
#pragma once

#include "boxes.h"
#include "exp_log.h"

namespace ssod {

// Divisors of the deltas of one axis.
template <typename T>
struct AxisScale {
  T centre, size;
};

// Deltas of one axis, or the ends of a box along it.
template <typename T>
struct AxisPair {
  T first, second;
};

// Gradients with respect to the two numbers of either input along one axis.
template <typename T>
struct AxisGrads {
  AxisPair<T> one, two;
};

// A side raised to 1e-6, so that it may divide. NaN stays.
template <typename T>
SSOD_HD T floored_side(T side) {
  return side < T(1e-6) ? T(1e-6) : side;
}

template <typename T>
SSOD_HD T floor_share(T side) {
  return side >= T(1e-6) ? T(1) : T(0);
}

template <typename T>
SSOD_HD T clamped_log(T x, T clamp) {
  return x < -clamp ? -clamp : (x > clamp ? clamp : x);
}

// Deltas from the proposal p to the target g.
template <typename T>
SSOD_HD AxisPair<T> encode_axis(AxisPair<T> p, AxisPair<T> g, AxisScale<T> scale) {
  const T p_size = floored_side(p.second - p.first), g_size = floored_side(g.second - g.first);
  const T distance = (g.first + g.second) / T(2) - (p.first + p.second) / T(2);
  return {distance / p_size / scale.centre, fast_log(g_size / p_size) / scale.size};
}

// Gradients of centre and size as those of the two ends.
template <typename T>
SSOD_HD AxisPair<T> end_gradients(T centre, T size) {
  return {centre / T(2) - size, centre / T(2) + size};
}

template <typename T>
SSOD_HD AxisGrads<T> encode_axis_gradients(AxisPair<T> grad, AxisPair<T> p, AxisPair<T> g, AxisScale<T> scale) {
  const T p_raw = p.second - p.first, g_raw = g.second - g.first;
  const T p_size = floored_side(p_raw), g_size = floored_side(g_raw);
  const T distance = (g.first + g.second) / T(2) - (p.first + p.second) / T(2);
  const T to_centre = grad.first / scale.centre / p_size, to_log = grad.second / scale.size;
  const T to_p_size = -(to_centre * (distance / p_size) + to_log / p_size) * floor_share(p_raw);
  return {end_gradients(-to_centre, to_p_size), end_gradients(to_centre, to_log / g_size * floor_share(g_raw))};
}

// The ends of the box that the deltas d make of the proposal p.
template <typename T>
SSOD_HD AxisPair<T> decode_axis(AxisPair<T> p, AxisPair<T> d, AxisScale<T> scale, T clamp) {
  const T size = p.second - p.first;
  const T centre = (p.first + p.second) / T(2) + size * (d.first * scale.centre);
  const T half = size * fast_exp(clamped_log(d.second * scale.size, clamp)) / T(2);
  return {centre - half, centre + half};
}

template <typename T>
SSOD_HD AxisGrads<T> decode_axis_gradients(AxisPair<T> grad, AxisPair<T> p, AxisPair<T> d, AxisScale<T> scale,
                                           T clamp) {
  const T size = p.second - p.first, log_size = d.second * scale.size;
  const T growth = fast_exp(clamped_log(log_size, clamp));
  const T to_centre = grad.first + grad.second, to_size = (grad.second - grad.first) / T(2);
  const T inside = log_size >= -clamp && log_size <= clamp ? T(1) : T(0);
  return {end_gradients(to_centre, to_centre * (d.first * scale.centre) + to_size * growth),
          {to_centre * size * scale.centre, to_size * (size * growth) * scale.size * inside}};
}

}  // namespace ssod
