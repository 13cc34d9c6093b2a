// float16 and bfloat16 to and from float in integer arithmetic that loops vectorise; on values and on short vectors.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "boxes.h"
#include "cpu/simd.h"

namespace ssod {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// kLanes values of T; T itself where kLanes is 1.
template <typename T, int kLanes>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
struct Lanes<T, 1> {
  using type = T;
};

template <typename To, typename From>
SSOD_HD void reinterpret(const From& from, To& to) {
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
}

// Bits of float16 numbers, one per 32-bit lane, as bits of floats. No step has a subnormal operand, which processors
// may be told to flush.
template <typename U, typename F>
SSOD_HD void half_bits_to_float(const U& bits, F& out) {
  const U magnitude = (bits & 0x7fffu) << 13, exponent = bits & 0x7c00u;
  const U normal = magnitude + (112u << 23);  // from bias 15 to bias 127
  // A subnormal number is a fraction on the scale of the least normal one: adding that makes it normal.
  const U shifted = magnitude + (113u << 23);
  F fraction;
  reinterpret(shifted, fraction);
  fraction -= 6.103515625e-05f;  // 2^-14
  U small;
  reinterpret(fraction, small);
  const U large = exponent == 0x7c00u ? (magnitude | 0x7f800000u) : normal;  // infinity and NaN
  const U result = (exponent == 0u ? small : large) | ((bits & 0x8000u) << 16);
  reinterpret(result, out);
}

SSOD_HD float widen(float x) { return x; }
SSOD_HD double widen(double x) { return x; }

SSOD_HD float widen(BFloat16 x) {
  float out;
  reinterpret(uint32_t{x.x} << 16, out);
  return out;
}

SSOD_HD float widen(Half x) {
  float out;
  half_bits_to_float(uint32_t{x.x}, out);
  return out;
}

// kLanes consecutive numbers.
template <int kLanes>
SSOD_HD void load_lanes(const float* from, typename Lanes<float, kLanes>::type& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <int kLanes>
SSOD_HD void load_lanes(const double* from, typename Lanes<double, kLanes>::type& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <int kLanes>
SSOD_HD void load_bits(const void* from, typename Lanes<uint32_t, kLanes>::type& bits) {
  typename Lanes<uint16_t, kLanes>::type stored;
  std::memcpy(&stored, from, sizeof(stored));
  if constexpr (kLanes == 1) {
    bits = stored;
  } else {
    bits = __builtin_convertvector(stored, typename Lanes<uint32_t, kLanes>::type);
  }
}

template <int kLanes>
SSOD_HD void load_lanes(const BFloat16* from, typename Lanes<float, kLanes>::type& to) {
  typename Lanes<uint32_t, kLanes>::type bits;
  load_bits<kLanes>(from, bits);
  bits <<= 16;
  reinterpret(bits, to);
}

template <int kLanes>
SSOD_HD void load_lanes(const Half* from, typename Lanes<float, kLanes>::type& to) {
  typename Lanes<uint32_t, kLanes>::type bits;
  load_bits<kLanes>(from, bits);
  half_bits_to_float(bits, to);
}

SSOD_HD void narrow(float x, float* to) { *to = x; }
SSOD_HD void narrow(double x, double* to) { *to = x; }

// Round to nearest, ties to even.
SSOD_HD void narrow(float x, BFloat16* to) {
  uint32_t bits;
  reinterpret(x, bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

SSOD_HD void narrow(float x, Half* to) {
  uint32_t bits;
  reinterpret(x, bits);
  const uint32_t magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  float absolute;
  reinterpret(magnitude, absolute);
  const float shifted = absolute + 0.5f;  // the last place of this sum is that of subnormal float16 numbers
  uint32_t small;
  reinterpret(shifted, small);
  const uint32_t finite = magnitude < (113u << 23) ? small - 0x3f000000u : normal;
  const uint32_t bounded = magnitude < 0x477ff000u ? finite : 0x7c00u;  // 65520 and more round to infinity
  to->x = static_cast<uint16_t>((x == x ? bounded : 0x7e00u) | sign);
}

template <typename From, typename To>
SSOD_CLONES static void widen_row(const From* __restrict from, To* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = widen(from[i]);
  }
}

template <typename From, typename To>
SSOD_CLONES static void narrow_row(const From* __restrict from, To* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    narrow(from[i], to + i);
  }
}

}  // namespace ssod
