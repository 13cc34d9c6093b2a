// The best few of many queries: bits of those that may still matter, and the list of the best so far.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "boxes.h"
#include "cpu/simd.h"

namespace ssod {

constexpr int64_t kChunk = 64;  // queries per word of bits

// Bit j: values[j] > bound, for j in 0..63. Never for NaN.
SSOD_CLONES static uint64_t above(const float* __restrict values, float bound) {
  uint32_t low = 0, high = 0;
  for (int j = 0; j < 32; ++j) {
    low |= static_cast<uint32_t>(values[j] > bound) << j;
  }
  for (int j = 0; j < 32; ++j) {
    high |= static_cast<uint32_t>(values[32 + j] > bound) << j;
  }
  return low | static_cast<uint64_t>(high) << 32;
}

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

// The bits of a word that belong to queries [chunk * 64, end).
inline uint64_t bits_before(int64_t chunk, int64_t end) {
  const int64_t left = end - chunk * kChunk;
  return left >= kChunk ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

// Calls f(position) for each bit that is set, from the lowest.
template <typename F>
void for_each_bit(uint64_t bits, F&& f) {
  for (; bits; bits &= bits - 1) {
    f(std::countr_zero(bits));
  }
}

// The k largest merits so far, the lowest query among equals. -inf is never taken.
class BestQueries {
 public:
  struct Entry {
    float merit;
    int32_t query;
    float iou;
  };

  void start(int64_t k) {
    k_ = k;
    entries_.clear();
  }

  // What the next one must exceed, or equal at a lower query.
  float floor() const { return full() ? entries_.back().merit : minus_infinity<float>(); }
  bool full() const { return static_cast<int64_t>(entries_.size()) == k_; }
  const std::vector<Entry>& entries() const { return entries_; }  // from the best down

  void offer(float merit, int64_t query, float iou) {
    if (!(merit > minus_infinity<float>()) || (full() && !before(merit, query, entries_.back()))) {
      return;
    }
    if (full()) {
      entries_.pop_back();
    }
    size_t at = entries_.size();
    entries_.push_back({});
    for (; at > 0 && before(merit, query, entries_[at - 1]); --at) {
      entries_[at] = entries_[at - 1];
    }
    entries_[at] = {merit, static_cast<int32_t>(query), iou};
  }

 private:
  static bool before(float merit, int64_t query, const Entry& other) {
    return merit > other.merit || (merit == other.merit && query < other.query);
  }

  int64_t k_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace ssod
