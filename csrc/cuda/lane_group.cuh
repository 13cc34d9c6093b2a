// Lanes of a warp as groups that work on one row each (csrc/ms_deform_attn_rows.h), and a block as a team.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ssod {

template <int kLanes>
struct LaneGroup {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x) % 32 / kLanes; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ uint32_t ballot(bool vote) const { return __ballot_sync(0xffffffffu, vote); }
  template <typename T>
  __device__ __forceinline__ T swap(T value, int distance) const {
    return __shfl_xor_sync(0xffffffffu, value, distance);
  }
};

// A block that only needs its barrier.
struct BlockThreads {
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

}  // namespace ssod
