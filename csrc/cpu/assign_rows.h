// Rows of queries against one target of one-to-many assignment, in loops that vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/best_queries.h"
#include "cpu/simd.h"
#include "one_to_many.h"

namespace ssod {

// Priors as planes, padded to whole chunks by points that lie nowhere.
struct PriorPlanes {
  std::vector<float> x, y, stride_x, stride_y;

  PriorPlanes(const float* priors, int64_t width, int64_t count) {
    for (auto* plane : {&x, &y, &stride_x, &stride_y}) {
      plane->assign(priors ? count + kChunk : 0, static_cast<float>(NAN));
    }
    for (int64_t q = 0; priors && q < count; ++q) {
      const float* v = priors + q * width;
      x[q] = v[0];
      y[q] = v[1];
      stride_x[q] = width > 2 ? v[2] : 1.0f;
      stride_y[q] = width > 2 ? v[3] : 1.0f;
    }
  }
};

struct Rectangle {
  float x1, y1, x2, y2;
};

// Bit j: the point (x[j], y[j]) lies in the rectangle by more than `margin`.
SSOD_CLONES static uint64_t points_inside(const float* __restrict x, const float* __restrict y, const Rectangle r,
                                          float margin) {
  uint32_t half[2] = {0, 0};
  for (int h = 0; h < 2; ++h) {
    const float *px = x + 32 * h, *py = y + 32 * h;
    uint32_t bits = 0;
    for (int j = 0; j < 32; ++j) {
      const bool in =
          (px[j] - r.x1 > margin) & (py[j] - r.y1 > margin) & (r.x2 - px[j] > margin) & (r.y2 - py[j] > margin);
      bits |= static_cast<uint32_t>(in) << j;
    }
    half[h] = bits;
  }
  return half[0] | static_cast<uint64_t>(half[1]) << 32;
}

// Bit j: the prior lies in the central region of "simota".
SSOD_CLONES static uint64_t points_central(const float* __restrict x, const float* __restrict y,
                                           const float* __restrict stride_x, const float* __restrict stride_y, float cx,
                                           float cy) {
  uint32_t half[2] = {0, 0};
  for (int h = 0; h < 2; ++h) {
    uint32_t bits = 0;
    for (int k = 0; k < 32; ++k) {
      const int j = 32 * h + k;
      const float dx = x[j] - cx, dy = y[j] - cy, rx = kCenterRadius * stride_x[j], ry = kCenterRadius * stride_y[j];
      const bool in = (rx + dx > 0.0f) & (ry + dy > 0.0f) & (rx - dx > 0.0f) & (ry - dy > 0.0f);
      bits |= static_cast<uint32_t>(in) << k;
    }
    half[h] = bits;
  }
  return half[0] | static_cast<uint64_t>(half[1]) << 32;
}

// Upper bounds of the metric: iou^exponent, which a probability can only lower.
template <int kExponent>
SSOD_CLONES static void power_row(const float* __restrict iou, float* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = whole_power(iou[j], kExponent);
  }
}

// Minus the squared distances of centres from a point; -inf where there is none.
SSOD_CLONES static void nearness_row(const float* __restrict x, const float* __restrict y, float cx, float cy,
                                     float* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float dx = x[j] - cx, dy = y[j] - cy;
    const float merit = -(dx * dx + dy * dy);
    out[j] = merit > minus_infinity<float>() ? merit : minus_infinity<float>();
  }
}

// A query that costs less than `cost` overlaps by more than this: class and centre terms only add to -3 ln(u + eps).
inline float least_overlap(float cost, float eps) {
  const float slack = 0.01f + 1e-5f * std::abs(cost);  // for rounding
  return std::exp(-(cost + slack) / kIouWeight) - eps;
}

}  // namespace ssod
