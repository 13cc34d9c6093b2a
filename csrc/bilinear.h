// Which source pixels one output pixel reads along an axis, and how much each counts.
// Float32 in exactly this order on every backend: its rounding decides which pixel is read. Compile without FMA
// contraction.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SSOD_SAMPLING_HD __host__ __device__ inline
#else
#define SSOD_SAMPLING_HD inline
#endif

namespace ssod {

enum class Interp : int { kNearest = 0, kBilinear = 1, kBilinearAA = 2 };

// Nearest neighbour with the given scale: inv source pixels per output pixel, u the output position.
SSOD_SAMPLING_HD int32_t nearest_index(int32_t u, float inv, int32_t size) {
  const int32_t i = static_cast<int32_t>(static_cast<float>(u) * inv);
  return i < size - 1 ? i : size - 1;
}

struct LinearTap {
  int32_t i0, i1;
  float t;  // weight of i1; i0 has 1 - t
};

// Two neighbours; pixel centres at half integers (align_corners = false).
SSOD_SAMPLING_HD LinearTap linear_tap(int32_t u, float inv, int32_t size) {
  float f = (static_cast<float>(u) + 0.5f) * inv - 0.5f;
  f = f > 0.0f ? f : 0.0f;
  const float floor_f = floorf(f);
  const int32_t last = size - 1, i = static_cast<int32_t>(floor_f);
  const int32_t i0 = i < last ? i : last, next = i + 1 < last ? i + 1 : last;
  const float t = f - floor_f;
  return {i0, t > 0.0f ? next : i0, t};  // without weight a neighbour is not read: its NaN stays where it is
}

// Support of a triangle that is one output pixel wide on either side (PIL's antialiasing); inv > 1.
struct TriangleTap {
  int32_t begin, end;  // half open
  float centre, radius;

  SSOD_SAMPLING_HD float weight(int32_t j) const {
    const float w = 1.0f - fabsf((static_cast<float>(j) - centre + 0.5f) / radius);
    return w > 0.0f ? w : 0.0f;
  }
};

SSOD_SAMPLING_HD TriangleTap triangle_tap(int32_t u, float inv, int32_t size) {
  const float centre = inv * (static_cast<float>(u) + 0.5f);
  const float low = centre - inv + 0.5f;
  const int32_t begin = low > 0.0f ? static_cast<int32_t>(low) : 0;
  const int32_t end = static_cast<int32_t>(centre + inv + 0.5f);
  return {begin, end < size ? end : size, centre, inv};
}

}  // namespace ssod
