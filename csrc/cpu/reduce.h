// Maximum of a block in L1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "boxes.h"
#include "cpu/box_planes.h"
#include "cpu/simd.h"

namespace ssod {

template <int kHalf, typename T>
SSOD_HD void halve(T* lane) {
  for (int k = 0; k < kHalf; ++k) {
    lane[k] = upper(lane[k], lane[k + kHalf]);
  }
}

// Largest of values[0..n), n a multiple of kWholeVector, that is not NaN, or -inf. Independent lanes: one running
// maximum would not vectorise.
template <typename T>
SSOD_CLONES static T largest_of_lanes(const T* __restrict values, int64_t n) {
  static_assert(kWholeVector == 32);
  T lane[kWholeVector];
  for (int64_t k = 0; k < kWholeVector; ++k) {
    lane[k] = upper(values[k], minus_infinity<T>());
  }
  for (int64_t i = kWholeVector; i < n; i += kWholeVector) {
    for (int64_t k = 0; k < kWholeVector; ++k) {
      lane[k] = upper(values[i + k], lane[k]);
    }
  }
  halve<16>(lane);
  halve<8>(lane);
  halve<4>(lane);
  halve<2>(lane);
  return upper(lane[0], lane[1]);
}

// Largest of block[0..n) that is not NaN, or -inf. Overwrites the block up to whole_vectors(n).
template <typename T>
T largest(T* block, int64_t n) {
  std::fill(block + n, block + whole_vectors(n), minus_infinity<T>());
  return largest_of_lanes(block, whole_vectors(n));
}

}  // namespace ssod
