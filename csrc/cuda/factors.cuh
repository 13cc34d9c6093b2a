// Short lists of numbers that travel with a launch, so that no tensor of them is ever uploaded; and vector stores.
#pragma once

#include <vector>

#include "cuda/common.cuh"
#include "neighborhood.h"

namespace ssod {

template <typename T>
struct Factors {
  T values[kMaxFactors];
  int64_t count;

  // Copies the list to shared memory, where threads of a warp may read different entries at once. All threads call it.
  __device__ __forceinline__ void copy_to(T* shared) const {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      shared[i] = values[i];
    }
  }
};

template <typename T>
Factors<T> make_factors(const std::vector<double>& values) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) <= kMaxFactors, "at most ", kMaxFactors, " factors, got ",
                  values.size());
  Factors<T> factors{};
  std::copy(values.begin(), values.end(), factors.values);
  factors.count = static_cast<int64_t>(values.size());
  return factors;
}

// Four numbers to an aligned address, float in one transaction.
template <typename T>
__device__ __forceinline__ void store_quad(T* out, T a, T b, T c, T d) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(out) = make_float4(a, b, c, d);
  } else {
    reinterpret_cast<double2*>(out)[0] = make_double2(a, b);
    reinterpret_cast<double2*>(out)[1] = make_double2(c, d);
  }
}

}  // namespace ssod
