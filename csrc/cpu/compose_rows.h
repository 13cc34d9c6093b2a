// Inner loops of compose on rows of float: plain loops that the compiler vectorises, one clone per instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace ssod::rows {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Turns a source value into a network input: weight * ((value - mean) / std).
//
// The quotient is computed as a product in double, cheaper than a division and the same float: no quotient
// of two floats lies closer than 2^-49 of its size to the middle between two floats, and the product is off by less
// than 2^-51.
struct Normal {
  float mean, std, weight;

  float operator()(float value) const { return weight * static_cast<float>((value - mean) * (1.0 / std)); }
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

// The three bytes of a pixel in one word: a single load then fetches all channels.
SSOD_CLONES static void pack_bytes(uint32_t* __restrict dst, const uint8_t* __restrict c0, const uint8_t* __restrict c1,
                                   const uint8_t* __restrict c2, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = c0[i] | (uint32_t{c1[i]} << 8) | (uint32_t{c2[i]} << 16);
}

SSOD_CLONES static void pack_bytes_strided(uint32_t* __restrict dst, const uint8_t* __restrict c0,
                                           const uint8_t* __restrict c1, const uint8_t* __restrict c2, int64_t stride,
                                           int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    dst[i] = c0[i * stride] | (uint32_t{c1[i * stride]} << 8) | (uint32_t{c2[i * stride]} << 16);
  }
}

inline float byte_of(uint32_t word, int c) {
  return static_cast<float>(static_cast<int32_t>((word >> (8 * c)) & 0xffu));
}

// Horizontal resampling: of one row of floats, or of one row of packed bytes into a row of floats per channel.

SSOD_CLONES static void gather(float* __restrict dst, const float* __restrict src, const int32_t* __restrict index,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[index[i]];
}

SSOD_CLONES static void gather(float* __restrict d0, float* __restrict d1, float* __restrict d2,
                               const uint32_t* __restrict src, const int32_t* __restrict index, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = src[index[i]];
    d0[i] = byte_of(a, 0);
    d1[i] = byte_of(a, 1);
    d2[i] = byte_of(a, 2);
  }
}

inline float lerp(float a, float b, float t) { return a + t * (b - a); }

SSOD_CLONES static void gather_linear(float* __restrict dst, const float* __restrict src, const int32_t* __restrict i0,
                                      const int32_t* __restrict i1, const float* __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = lerp(src[i0[i]], src[i1[i]], t[i]);
}

SSOD_CLONES static void gather_linear(float* __restrict d0, float* __restrict d1, float* __restrict d2,
                                      const uint32_t* __restrict src, const int32_t* __restrict i0,
                                      const int32_t* __restrict i1, const float* __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = src[i0[i]], b = src[i1[i]];
    d0[i] = lerp(byte_of(a, 0), byte_of(b, 0), t[i]);
    d1[i] = lerp(byte_of(a, 1), byte_of(b, 1), t[i]);
    d2[i] = lerp(byte_of(a, 2), byte_of(b, 2), t[i]);
  }
}

SSOD_CLONES static void gather_add(float* __restrict dst, const float* __restrict src, const int32_t* __restrict index,
                                   const float* __restrict weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += weight[i] * src[index[i]];
}

SSOD_CLONES static void gather_add(float* __restrict d0, float* __restrict d1, float* __restrict d2,
                                   const uint32_t* __restrict src, const int32_t* __restrict index,
                                   const float* __restrict weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = src[index[i]];
    d0[i] += weight[i] * byte_of(a, 0);
    d1[i] += weight[i] * byte_of(a, 1);
    d2[i] += weight[i] * byte_of(a, 2);
  }
}

// Vertical resampling and normalisation.

SSOD_CLONES static void normalise(float* __restrict dst, const float* __restrict src, Normal normal, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = normal(src[i]);
}

SSOD_CLONES static void normalise_linear(float* __restrict dst, const float* __restrict a, const float* __restrict b,
                                         float t, Normal normal, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = normal(lerp(a[i], b[i], t));
}

// Output, one rounding.

inline void narrow(float* dst, float value) { *dst = value; }

inline void narrow(Half* dst, float value) { *dst = static_cast<Half>(value); }

inline void narrow(BFloat16* dst, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half to even
  dst->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void narrow(uint8_t* dst, float value) {
  value = value > 0.0f ? value : 0.0f;  // NaN becomes 0
  value = value < 255.0f ? value : 255.0f;
  constexpr float kShift = 8388608.0f;  // 2^23: adding it rounds to an integer, half to even
  *dst = static_cast<uint8_t>(static_cast<int32_t>((value + kShift) - kShift));
}

SSOD_CLONES static void store(BFloat16* __restrict dst, const float* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(dst + i, src[i]);
}

SSOD_CLONES static void store(uint8_t* __restrict dst, const float* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(dst + i, src[i]);
}

SSOD_CLONES static void store(Half* __restrict dst, const float* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(dst + i, src[i]);
}

// Only planar rows come here; float ones are written in place.
inline void store(float* dst, const float* src, int64_t n) { std::memcpy(dst, src, n * sizeof(float)); }

template <typename T>
void store_interleaved(T* __restrict dst, const float* c0, const float* c1, const float* c2, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    narrow(dst + 3 * i, c0[i]);
    narrow(dst + 3 * i + 1, c1[i]);
    narrow(dst + 3 * i + 2, c2[i]);
  }
}

}  // namespace ssod::rows
