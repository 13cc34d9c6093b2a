// Inner loops of compose on rows of float: plain loops that the compiler vectorises, one clone per instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "simd.h"

namespace ssod::rows {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Turns a source value into a network input: weight * ((value - mean) / std).
struct Normal {
  float mean, std, weight;

  float operator()(float value) const { return weight * ((value - mean) / std); }
};

SSOD_CLONES static void fill(float* __restrict dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = value;
}

SSOD_CLONES static void add(float* __restrict dst, const float* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += src[i];
}

SSOD_CLONES static void add_value(float* __restrict dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += value;
}

SSOD_CLONES static void add_scaled(float* __restrict dst, const float* __restrict src, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += factor * src[i];
}

SSOD_CLONES static void widen_bytes(float* __restrict dst, const uint8_t* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

// Horizontal resampling.

SSOD_CLONES static void gather(float* __restrict dst, const float* __restrict src, const int32_t* __restrict index,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[index[i]];
}

SSOD_CLONES static void gather_linear(float* __restrict dst, const float* __restrict src, const int32_t* __restrict i0,
                                      const int32_t* __restrict i1, const float* __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = src[i0[i]];
    dst[i] = a + t[i] * (src[i1[i]] - a);
  }
}

SSOD_CLONES static void gather_add(float* __restrict dst, const float* __restrict src, const int32_t* __restrict index,
                                   const float* __restrict weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += weight[i] * src[index[i]];
}

// Vertical resampling and normalisation.

SSOD_CLONES static void normalise(float* __restrict dst, const float* __restrict src, Normal normal, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = normal(src[i]);
}

SSOD_CLONES static void normalise_linear(float* __restrict dst, const float* __restrict a, const float* __restrict b,
                                         float t, Normal normal, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = normal(a[i] + t * (b[i] - a[i]));
}

// Output, one rounding.

template <typename T>
inline T narrow(float value) {
  return static_cast<T>(value);
}

template <>
inline uint8_t narrow<uint8_t>(float value) {
  value = value > 0.0f ? value : 0.0f;  // NaN becomes 0
  value = value < 255.0f ? value : 255.0f;
  constexpr float kShift = 8388608.0f;  // 2^23: adding it rounds to an integer, half to even
  return static_cast<uint8_t>((value + kShift) - kShift);
}

}  // namespace ssod::rows
