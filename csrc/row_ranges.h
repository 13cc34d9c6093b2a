// Which rows of a flat tensor belong to which problem of a batch: ragged by offsets, padded by counts, or all of equal
// size.
#pragma once

#include <cstdint>

#include "boxes.h"

namespace ssod {

struct RowRange {
  int64_t begin, size;
};

struct RowRanges {
  const int64_t* offsets;  // [batch + 1], or null
  const int64_t* counts;   // [batch], or null
  int64_t rows, batch;

  // Values are clamped into range; offsets that fall make an empty problem.
  SSOD_HD RowRange of(int64_t problem) const {
    if (offsets) {
      const int64_t begin = clamped(offsets[problem], rows), end = clamped(offsets[problem + 1], rows);
      return {begin, end > begin ? end - begin : 0};
    }
    const int64_t width = rows / batch;
    return {problem * width, counts ? clamped(counts[problem], width) : width};
  }

  // Whether rows of an earlier problem reach beyond the start of this one, as offsets that fall make possible.
  SSOD_HD bool overlapped(int64_t problem) const {
    const int64_t begin = of(problem).begin;
    for (int64_t earlier = 0; offsets && earlier < problem; ++earlier) {
      const RowRange other = of(earlier);
      if (other.begin + other.size > begin) {
        return true;
      }
    }
    return false;
  }

 private:
  SSOD_HD static int64_t clamped(int64_t value, int64_t most) { return value < 0 ? 0 : (value > most ? most : value); }
};

// Rows before those of the first image, and rows behind those of an image up to the next: every row that belongs to no
// image lies in exactly one of these ranges.
SSOD_HD RowRange gap_before(const RowRanges& ranges, int64_t image) { return {0, image == 0 ? ranges.of(0).begin : 0}; }

SSOD_HD RowRange gap_behind(const RowRanges& ranges, int64_t image) {
  const RowRange own = ranges.of(image);
  const int64_t begin = own.begin + own.size;
  if (ranges.offsets) {
    return {begin, image + 1 < ranges.batch ? 0 : ranges.rows - begin};
  }
  return {begin, (image + 1) * (ranges.rows / ranges.batch) - begin};
}

}  // namespace ssod
