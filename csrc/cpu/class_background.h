// The part of the costs of one-to-many assignment that all targets have in common: sums over the classes of a query.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/simd.h"
#include "one_to_many.h"

namespace ssod {

// Sum of max(ln(1 - p), -100) for n probabilities, n a multiple of 8: the logarithm of products. The smallest factor
// above 0 is 2^-24, so that forty of them are far from the end of double.
SSOD_CLONES static double log_misses(const float* __restrict p, int64_t n) {
  constexpr int64_t kLanes = 8, kFactors = 10;
  double sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += kLanes * kFactors) {
    const int64_t end = begin + kLanes * kFactors < n ? begin + kLanes * kFactors : n;
    double product[kLanes], zeros[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      product[k] = 1.0;
      zeros[k] = 0.0;
    }
    for (int64_t i = begin; i < end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        const float x = p[i + k], bounded = x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x);
        const double miss = 1.0 - static_cast<double>(bounded);
        product[k] *= miss == 0.0 ? 1.0 : miss;
        zeros[k] += miss == 0.0 ? 1.0 : 0.0;
      }
    }
    for (int64_t k = 0; k < kLanes; k += 4) {
      sum += std::log((product[k] * product[k + 1]) * (product[k + 2] * product[k + 3]));
      sum += static_cast<double>(kMinLog) * (zeros[k] + zeros[k + 1] + zeros[k + 2] + zeros[k + 3]);
    }
  }
  return sum;
}

// Sum over n logits, n a multiple of 8.
template <AssignRule rule>
SSOD_CLONES static float logit_background(const float* __restrict x, int64_t n) {
  constexpr int64_t kLanes = 8;
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lane[k] += class_background<rule>(x[i + k], true);
    }
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// Background of the query whose scores stand at x, `stride` apart.
template <AssignRule rule>
float sum_background(const float* x, int64_t stride, int64_t classes, bool from_logits, std::vector<float>& scratch) {
  if (stride != 1) {
    scratch.resize(classes);
    for (int64_t c = 0; c < classes; ++c) {
      scratch[c] = x[c * stride];
    }
    x = scratch.data();
  }
  const int64_t whole = classes / 8 * 8;
  double sum = from_logits ? static_cast<double>(logit_background<rule>(x, whole)) : log_misses(x, whole);
  for (int64_t c = whole; c < classes; ++c) {
    sum += static_cast<double>(class_background<rule>(x[c], from_logits));
  }
  return static_cast<float>(sum);
}

}  // namespace ssod
