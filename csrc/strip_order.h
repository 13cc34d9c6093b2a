// Order in which a block of threads takes queries that are the pixels of a pyramid: strips of eight rows, column by
// column inside a strip, so that 64 queries in a row are about 8 x 8 pixels and read neighbouring values.
#pragma once

#include <cstdint>

#include "boxes.h"

namespace ssod {

constexpr int32_t kStripRows = 8;

// Row-major token of position p of one level in strip order; a bijection of 0..height * width - 1.
SSOD_HD int32_t strip_token(int32_t p, int32_t height, int32_t width) {
  const int32_t top = p / (kStripRows * width) * kStripRows;
  const int32_t left = height - top, rows = left < kStripRows ? left : kStripRows;
  const int32_t inside = p - top * width;
  const int32_t x = inside / rows;
  return (top + inside - x * rows) * width + x;
}

// Token of position p of a pyramid whose levels follow each other, which hold more than p tokens together. Levels have
// members height and width.
template <typename Level>
SSOD_HD int32_t pyramid_token(int32_t p, const Level* levels) {
  int32_t first = 0;
  for (;; ++levels) {
    const auto height = static_cast<int32_t>(levels->height), width = static_cast<int32_t>(levels->width);
    const int32_t size = height * width;
    if (p < size) {
      return first + strip_token(p, height, width);
    }
    p -= size;
    first += size;
  }
}

}  // namespace ssod
