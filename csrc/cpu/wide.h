// Vectors of 64 bytes in the compiler's own notation: it splits them where registers are shorter. Functions take them
// by reference and are always inlined, because how vectors are passed by value differs between instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "boxes.h"
#include "cpu/simd.h"

namespace ssod {

template <typename T>
struct Wide {
  typedef T Values __attribute__((vector_size(64)));
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));
  static constexpr int64_t kLanes = 64 / sizeof(T);
};

// The integers that comparisons of T give.
template <typename T>
struct LaneInteger;
template <>
struct LaneInteger<float> {
  using type = int32_t;
};
template <>
struct LaneInteger<double> {
  using type = int64_t;
};

template <typename V>
SSOD_HD void load(const void* from, V& v) {
  std::memcpy(&v, from, sizeof(V));
}

template <typename V>
SSOD_HD void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

// The least of all lanes; NaN in none of them.
template <typename T>
SSOD_HD T lowest_lane(const typename Wide<T>::Values& v) {
  typename Wide<T>::Half h, h2;
  load(&v, h);
  load(reinterpret_cast<const char*>(&v) + 32, h2);
  h = h < h2 ? h : h2;
  typename Wide<T>::Quarter q, q2;
  load(&h, q);
  load(reinterpret_cast<const char*>(&h) + 16, q2);
  q = q < q2 ? q : q2;
  T least = q[0] < q[1] ? q[0] : q[1];
  if constexpr (sizeof(T) == 4) {
    const T other = q[2] < q[3] ? q[2] : q[3];
    least = least < other ? least : other;
  }
  return least;
}

// The sum of all lanes.
template <typename T>
SSOD_HD T sum_of_lanes(const typename Wide<T>::Values& v) {
  typename Wide<T>::Half h, h2;
  load(&v, h);
  load(reinterpret_cast<const char*>(&v) + 32, h2);
  h += h2;
  typename Wide<T>::Quarter q, q2;
  load(&h, q);
  load(reinterpret_cast<const char*>(&h) + 16, q2);
  q += q2;
  T sum = q[0] + q[1];
  if constexpr (sizeof(T) == 4) {
    sum += q[2] + q[3];
  }
  return sum;
}

}  // namespace ssod
