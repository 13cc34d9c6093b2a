// Order in which kernels visit queries that are the tokens of a feature pyramid, one query per token.
//
// Queries of one block of threads should be neighbours in both directions, because they sample the same pixels. Levels
// are cut into strips of 8 rows, and a strip is walked column by column, so that any 64 consecutive positions lie in a
// patch of about 8 x 8. The order only says who computes a query, never how: results do not change by a bit.
#pragma once

#include <cstdint>

#include "boxes.h"

namespace ssod {

constexpr int kStripRows = 8;

// Token, row by row, at one position of the strip order of a level; a bijection of 0 ... height * width - 1.
template <typename I>
SSOD_HD I strip_token(I position, I height, I width) {
  const I strip = position / (kStripRows * width);
  const I top = strip * kStripRows;
  const I rows = height - top < kStripRows ? height - top : kStripRows;
  const I inside = position - top * width;
  return (top + inside % rows) * width + inside / rows;
}

// Token at one position of the strip order of a pyramid, level after level; `sizes` is [levels, 2], (height, width).
// A bijection of 0 ... tokens - 1 for any sizes: from the first level on that does not fit into `tokens`, tokens keep
// their own order. I must hold 8 * tokens.
template <typename I>
SSOD_HD I strip_query(I position, const int64_t* sizes, int levels, I tokens) {
  I first = 0;
  for (int level = 0; level < levels; ++level) {
    const int64_t height = sizes[2 * level], width = sizes[2 * level + 1];
    if (height <= 0 || width <= 0) {
      continue;
    }
    if (height > (tokens - first) / width) {
      break;
    }
    const I size = static_cast<I>(height * width);
    if (position - first < size) {
      return first + strip_token(position - first, static_cast<I>(height), static_cast<I>(width));
    }
    first += size;
  }
  return position;
}

}  // namespace ssod
