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
  };

  void start(int64_t k) {
    k_ = k;
    size_ = 0;
    floor_ = minus_infinity<float>();
    if (static_cast<int64_t>(entries_.size()) < k) {
      entries_.resize(k);
    }
  }

  // What the next one must exceed, or equal at a lower query.
  float floor() const { return floor_; }
  bool full() const { return size_ == k_; }
  const Entry* begin() const { return entries_.data(); }  // from the best down
  const Entry* end() const { return entries_.data() + size_; }

  void offer(float merit, int64_t query) {
    if (merit > floor_) {
      insert(merit, static_cast<int32_t>(query));
    } else if (merit == floor_ && full() && merit > minus_infinity<float>() && query < entries_[k_ - 1].query) {
      insert(merit, static_cast<int32_t>(query));
    }
  }

 private:
  void insert(float merit, int32_t query) {
    Entry* entries = entries_.data();
    int64_t at = size_ < k_ ? size_++ : k_ - 1;
    for (; at > 0; --at) {
      const Entry other = entries[at - 1];
      if (other.merit > merit || (other.merit == merit && other.query < query)) {
        break;
      }
      entries[at] = other;
    }
    entries[at] = {merit, query};
    floor_ = full() ? entries[k_ - 1].merit : floor_;
  }

  int64_t k_ = 0, size_ = 0;
  float floor_ = minus_infinity<float>();
  std::vector<Entry> entries_;
};

}  // namespace ssod
