// exp and log in a form that loops over float vectorise; within two units in the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "boxes.h"

namespace ssod {

template <typename To, typename From>
SSOD_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &x, sizeof(To));
  return result;
}

// 2^n for n in -126..127.
SSOD_HD float power_of_two(int32_t n) { return bits_as<float>((n + 127) << 23); }

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where eight terms of the series suffice.
SSOD_HD float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it drops the fraction
  const float bounded = x > -110.f ? (x < 100.f ? x : 100.f) : -110.f;
  const float whole = (bounded * 1.44269504f + kRound) - kRound;
  const float r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln(2) in two parts
  float sum = 1.f / 5040;
  sum = sum * r + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r * r + r + 1.f;
  const int32_t n = static_cast<int32_t>(whole), half = n >> 1;  // two factors, as 2^n may not be a normal number
  const float result = sum * power_of_two(half) * power_of_two(n - half);
  return x == x ? result : x;
#endif
}

// log(x) = e ln(2) + log(m) with m in sqrt(1/2)..sqrt(2), and log(m) = 2 artanh((m - 1) / (m + 1)).
SSOD_HD float fast_log(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  constexpr int32_t kRootHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  const bool tiny = x < 1.17549435e-38f;
  const int32_t bits = bits_as<int32_t>(tiny ? x * 8388608.f : x) - kRootHalf;
  const float exponent = static_cast<float>((bits >> 23) - (tiny ? 23 : 0));
  const float f = bits_as<float>((bits & 0x7fffff) + kRootHalf) - 1.f;
  const float s = f / (2.f + f), z = s * s;
  float sum = 1.f / 11;
  sum = sum * z + 1.f / 9;
  sum = sum * z + 1.f / 7;
  sum = sum * z + 1.f / 5;
  sum = sum * z + 1.f / 3;
  const float result = exponent * 0.693359375f + ((2.f * s + 2.f * s * z * sum) - exponent * 2.12194440e-4f);
  const float edge = x == 0.f ? -INFINITY : (x < 0.f ? NAN : x);  // x itself where it is infinite or NaN
  return x > 0.f && x - x == 0.f ? result : edge;
#endif
}

SSOD_HD double fast_exp(double x) { return ::exp(x); }
SSOD_HD double fast_log(double x) { return ::log(x); }

}  // namespace ssod
