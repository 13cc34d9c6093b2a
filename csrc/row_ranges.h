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

 private:
  SSOD_HD static int64_t clamped(int64_t value, int64_t most) { return value < 0 ? 0 : (value > most ? most : value); }
};

}  // namespace ssod
