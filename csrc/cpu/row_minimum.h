// The smallest entry of a row of costs and its lowest index, in one pass over memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/wide.h"

namespace ssod {

template <typename T>
struct RowMinimum {
  T value;
  int64_t column;  // the lowest of those that hold the value
  bool finite;     // whether the whole row is; if not, value and column mean nothing
};

template <typename T>
bool all_finite(const T* row, int64_t n) {
  return std::all_of(row, row + n, [](T x) { return std::isfinite(x); });
}

template <typename T>
RowMinimum<T> short_row_minimum(const T* row, int64_t n) {
  const T* least = std::min_element(row, row + n);
  return {*least, least - row, all_finite(row, n)};
}

// n > 0. Blocks of four vectors: lanes remember the block of their minimum, and only the first such block is searched.
// The last block ends with the row, so it may overlap the one before.
template <typename T>
SSOD_CLONES static RowMinimum<T> row_minimum(const T* row, int64_t n) {
  using V = typename Wide<T>::Values;
  using Integer = typename LaneInteger<T>::type;
  using I = typename Wide<Integer>::Values;
  constexpr int64_t kLanes = Wide<T>::kLanes, kBlock = 4 * kLanes, kAhead = 4096 / sizeof(T);
  if (n < kBlock) {
    return short_row_minimum(row, n);
  }
  V lowest = V{} + std::numeric_limits<T>::infinity(), sum = V{};
  I block_of = I{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const T* block = row + std::min(begin, n - kBlock);
    V x[4];
    for (int k = 0; k < 4; ++k) {
      load(block + k * kLanes, x[k]);
      __builtin_prefetch(block + k * kLanes + kAhead);  // rows follow each other in memory
    }
    sum += (x[0] + x[1]) + (x[2] + x[3]);  // NaN and infinities stick
    const V a = x[0] < x[1] ? x[0] : x[1], b = x[2] < x[3] ? x[2] : x[3];
    const V low = a < b ? a : b;
    const I lower = low < lowest;
    block_of = lower ? I{} + static_cast<Integer>(begin / kBlock) : block_of;
    lowest = lower ? low : lowest;
  }
  const T value = lowest_lane<T>(lowest), total = sum_of_lanes<T>(sum);
  if (!std::isfinite(total) && !all_finite(row, n)) {  // a sum of finite costs may overflow
    return {value, 0, false};
  }
  const I none = I{} + std::numeric_limits<Integer>::max();
  const I holders = lowest == value ? block_of : none;
  const int64_t begin = std::min<int64_t>(lowest_lane<Integer>(holders) * kBlock, n - kBlock);
  I lane, first = none;
  for (int64_t i = 0; i < kLanes; ++i) {
    lane[i] = static_cast<Integer>(i);
  }
  for (int k = 4; k-- > 0;) {
    V x;
    load(row + begin + k * kLanes, x);
    first = x == value ? lane + static_cast<Integer>(k * kLanes) : first;
  }
  return {value, begin + lowest_lane<Integer>(first), true};
}

}  // namespace ssod
