// The threads of one CUDA block as a team (csrc/team.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"

namespace ssod {

// What a block needs to reduce: two sets of one slot per warp, used in turn, so that one barrier per reduction is
// enough.
template <int kThreads>
struct alignas(16) BlockExchange {
  unsigned char slots[2][kThreads / 32][kMaxReduced];
};

template <int kThreads>
class BlockTeam {
 public:
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);

  __device__ explicit BlockTeam(BlockExchange<kThreads>& exchange) : exchange_(exchange) {}

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int size() { return kThreads; }
  __device__ void sync() const { __syncthreads(); }

  template <typename T, typename Op>
  __device__ T reduce(T value, Op op) {
    static_assert(sizeof(T) <= kMaxReduced && sizeof(T) % 4 == 0);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      value = op(value, shuffle_xor(value, lanes));
    }
    if constexpr (kThreads > 32) {
      auto& slots = exchange_.slots[turn_];
      turn_ ^= 1;
      if (threadIdx.x % 32 == 0) {
        memcpy(slots[threadIdx.x / 32], &value, sizeof(T));
      }
      __syncthreads();
      memcpy(&value, slots[0], sizeof(T));
      for (int warp = 1; warp < kThreads / 32; ++warp) {
        T other;
        memcpy(&other, slots[warp], sizeof(T));
        value = op(value, other);
      }
    } else {
      __syncwarp();
    }
    return value;
  }

 private:
  template <typename T>
  __device__ static T shuffle_xor(T value, int lanes) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    for (uint32_t& word : words) {
      word = __shfl_xor_sync(0xffffffffu, word, lanes);
    }
    memcpy(&value, words, sizeof(T));
    return value;
  }

  BlockExchange<kThreads>& exchange_;
  int turn_ = 0;
};

}  // namespace ssod
