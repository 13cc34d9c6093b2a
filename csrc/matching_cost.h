// Maths of the matching cost of one target and one query, shared by the CPU and CUDA kernels and tested through
// tests/cpp/matching_cost.cpp. ssod_fast/ops/matching_cost.py is the specification.
//
// That 1 - p is rounded to float32 is part of the contract: matchings of saturated predictions depend on it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "boxes.h"

namespace ssod {

enum class ClassMode : int64_t { focal, focal_logits, softmax, prob, none };

// Options of a call; a plain value, passed to kernels as it is.
template <typename T>
struct CostRule {
  ClassMode class_mode;
  Format format;
  bool zero;    // eps mode "zero" of GIoU
  bool square;  // gamma is 2
  T alpha, beta;
  T gamma, eps;
  T w_class, w_box, w_giou;
  Eps<T> giou_eps;
};

template <typename T>
CostRule<T> make_cost_rule(int64_t class_mode, double alpha, double gamma, double eps, double w_class, double w_box,
                           double w_giou, int64_t fmt, int64_t eps_mode, double giou_eps) {
  const auto guard = static_cast<EpsMode>(eps_mode);
  return {static_cast<ClassMode>(class_mode),
          static_cast<Format>(fmt),
          guard == EpsMode::zero,
          gamma == 2,
          static_cast<T>(alpha),
          static_cast<T>(1 - alpha),
          static_cast<T>(gamma),
          static_cast<T>(eps),
          static_cast<T>(w_class),
          static_cast<T>(w_box),
          static_cast<T>(w_giou),
          make_eps<T>(guard, giou_eps)};
}

template <typename To, typename From>
SSOD_HD To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// e^x for x <= 0, to 2 units in the last place; 0 where the result is not a normal number. NaN stays NaN.
SSOD_HD double exp_down(double x) { return std::exp(x); }

SSOD_HD float exp_down(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer, whose low bits then stand at the end of the float.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.3814613217e-3f;  // minimax, 3e-9 relative
  y = y * r + 8.3687099589e-3f;
  y = y * r + 4.1668387372e-2f;
  y = y * r + 1.6666520689e-1f;
  y = y * r + 4.9999993452e-1f;
  y = (y * (r * r) + r) + 1.0f;
  const float scaled = same_bits<float>(same_bits<uint32_t>(y) + (same_bits<uint32_t>(shifted) << 23));
  const float result = x < -87.0f ? 0.0f : scaled;
  return x == x ? result : x;
#endif
}

// ln x for positive normal x, to 1.3e-7 absolute below 1 and relative above; anything for other x.
SSOD_HD double log_normal(double x) { return std::log(x); }

SSOD_HD float log_normal(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  // x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  constexpr int32_t kHalfRoot = 0x3f3504f3;
  const int32_t bits = same_bits<int32_t>(x) - kHalfRoot;
  const float k = static_cast<float>(bits >> 23);
  const float f = same_bits<float>((bits & 0x007fffff) + kHalfRoot) - 1.0f;
  float y = -1.0221688475e-1f;  // minimax, 6e-8 absolute
  y = y * f + 1.6140578418e-1f;
  y = y * f - 1.7167320470e-1f;
  y = y * f + 1.9910311394e-1f;
  y = y * f - 2.4980557123e-1f;
  y = y * f + 3.3334689209e-1f;
  return (f + (f * f) * (y * f - 0.5f)) + k * 0.693147181f;
#endif
}

// The same for x in [0.5, 1.01], where there is no exponent to take off.
SSOD_HD double log_near_one(double x) { return std::log(x); }

SSOD_HD float log_near_one(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  const float f = x - 1.0f;
  float y = -1.2536402704f;  // minimax, 6e-8 absolute
  y = y * f - 1.1863514639f;
  y = y * f - 8.4156491720e-1f;
  y = y * f + 2.7450250732e-2f;
  y = y * f - 2.7157746813e-1f;
  y = y * f + 3.3230076623e-1f;
  return f + (f * f) * (y * f - 0.5f);
#endif
}

// x^gamma for 0 <= x <= 1.
template <bool square, typename T>
SSOD_HD T focal_power(T x, T gamma) {
  if constexpr (square) {
    return x * x;
  }
  const T power = exp_down(gamma * log_normal(x));
  const T of_zero = gamma == T(0) ? T(1) : x;  // x is 0 or NaN
  return x > T(0) ? power : of_zero;
}

// Class term of the focal modes for logit x (Lin et al. 2017, as a cost: positive minus negative part).
//
// The smaller of p and 1 - p is computed and the larger is its complement, so that p is rounded once. `low` is then 1 -
// p of the rounded p where p is the larger, and p where it is the smaller.
template <ClassMode mode, bool square, typename T>
SSOD_HD T focal_cost(T x, const CostRule<T>& rule) {
  const bool likely = x >= T(0);
  const T size = std::abs(x);
  const T e = exp_down(-size);
  const T small = e / (T(1) + e), high = T(1) - small;
  const T low = likely ? T(1) - high : small;
  T minus_log_high, minus_log_low;
  if constexpr (mode == ClassMode::focal) {
    minus_log_high = -log_near_one(high + rule.eps);
    minus_log_low = -log_normal(low + rule.eps);
  } else {  // softplus of -|x| and of |x|
    minus_log_high = log_normal(T(1) + e);
    minus_log_low = size + minus_log_high;
  }
  // A NaN logit makes both powers NaN, whatever its logarithms are.
  const T of_high = focal_power<square>(high, rule.gamma) * minus_log_low;
  const T of_low = focal_power<square>(low, rule.gamma) * minus_log_high;
  return rule.alpha * (likely ? of_low : of_high) - rule.beta * (likely ? of_high : of_low);
}

// Class term of mode "softmax" from the row's maximum and the sum of exp(x - maximum).
template <typename T>
SSOD_HD T softmax_cost(T x, T maximum, T sum) {
  return -(exp_down(x - maximum) / sum);
}

// The four numbers that the L1 term compares.
template <typename T>
struct L1Box {
  T a, b, c, d;
};

template <typename T>
SSOD_HD T distance(T a, T b) {
  return std::abs(a - b);
}

template <typename T>
SSOD_HD T l1_distance(const L1Box<T>& x, const L1Box<T>& y) {
  return ((distance(x.a, y.a) + distance(x.b, y.b)) + distance(x.c, y.c)) + distance(x.d, y.d);
}

// The cost from its box terms and the weighted class term.
template <bool zero, typename T>
SSOD_HD T pair_cost(const Box<T>& query, const L1Box<T>& query_l1, const Box<T>& target, const L1Box<T>& target_l1,
                    T weighted_class, const CostRule<T>& rule) {
  const T l1 = rule.w_box * l1_distance(query_l1, target_l1);
  return (l1 + weighted_class) - rule.w_giou * overlap<Mode::giou, zero>(query, target, rule.giou_eps);
}

// Key of a row that holds an invalid entry, or none at all: whoever wants its minimum has to look.
constexpr int64_t kUnknownKey = INT64_MIN;

// Neither NaN nor infinite.
template <typename T>
SSOD_HD bool is_valid_cost(T x) {
  return x - x == T(0);
}

// A float as an integer that rises with it; -0 counts as 0.
SSOD_HD int32_t orderable(float x) {
  const int32_t bits = same_bits<int32_t>(x + 0.0f);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Value in the high half, query in the low half: the smallest key is the smallest cost at its lowest query.
SSOD_HD int64_t row_key(int32_t order, int64_t query) {
  return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(order)) << 32) |
                              static_cast<uint64_t>(query));
}

}  // namespace ssod
