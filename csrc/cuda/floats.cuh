// Float tensors on the device: of a type known at run time, element by element; and of a type known at compile time, in
// vectors of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common.cuh"

namespace ssod {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename V>
using WideOf = std::conditional_t<std::is_same_v<V, double>, double, float>;

template <typename V>
__device__ __forceinline__ V narrow(WideOf<V> x) {
  if constexpr (std::is_same_v<V, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<V, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// A tensor of float32, float16 or bfloat16, or, where it is used with T = double, of float64.
struct AnyFloats {
  void* data;
  ScalarType type;
  bool paired;  // even elements are aligned to two

  template <typename T>
  __device__ __forceinline__ T load(int64_t i) const {
    if constexpr (std::is_same_v<T, double>) {
      return as<double>()[i];
    } else {
      return type == ScalarType::Float  ? as<float>()[i]
             : type == ScalarType::Half ? widen(as<__half>()[i])
                                        : widen(as<__nv_bfloat16>()[i]);
    }
  }

  __device__ __forceinline__ void load_pair(int64_t i, float& x, float& y) const {
    if (!paired) {
      x = load<float>(i);
      y = load<float>(i + 1);
    } else if (type == ScalarType::Float) {
      const float2 pair = *reinterpret_cast<const float2*>(as<float>() + i);
      x = pair.x;
      y = pair.y;
    } else {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(as<uint16_t>() + i);
      const float2 pair = type == ScalarType::Half ? __half22float2(reinterpret_cast<const __half2&>(bits))
                                                   : __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
      x = pair.x;
      y = pair.y;
    }
  }

  __device__ __forceinline__ void load_pair(int64_t i, double& x, double& y) const {
    x = as<double>()[i];
    y = as<double>()[i + 1];
  }

  __device__ __forceinline__ AnyFloats from(int64_t i) const {
    const int bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    return {as<char>() + i * bytes, type, paired};
  }

  __device__ __forceinline__ void store(int64_t i, float x) const {
    if (type == ScalarType::Float) {
      as<float>()[i] = x;
    } else if (type == ScalarType::Half) {
      as<__half>()[i] = narrow<__half>(x);
    } else {
      as<__nv_bfloat16>()[i] = narrow<__nv_bfloat16>(x);
    }
  }

  __device__ __forceinline__ void store(int64_t i, double x) const { as<double>()[i] = x; }

  // Two elements of a fresh tensor, i even.
  __device__ __forceinline__ void store_pair(int64_t i, float x, float y) const {
    if (type == ScalarType::Float) {
      *reinterpret_cast<float2*>(as<float>() + i) = make_float2(x, y);
    } else if (type == ScalarType::Half) {
      *reinterpret_cast<__half2*>(as<__half>() + i) = __floats2half2_rn(x, y);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(as<__nv_bfloat16>() + i) = __floats2bfloat162_rn(x, y);
    }
  }

  __device__ __forceinline__ void store_pair(int64_t i, double x, double y) const {
    as<double>()[i] = x;
    as<double>()[i + 1] = y;
  }

 private:
  template <typename X>
  __device__ __forceinline__ X* as() const {
    return static_cast<X*>(data);
  }
};

// `paired` holds if every row begins at an even element of memory that is aligned to two elements.
inline AnyFloats any_floats(const Tensor& t, int64_t row_stride) {
  const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {t.data_ptr(), t.scalar_type(), row_stride % 2 == 0 && address % (2 * t.element_size()) == 0};
}

namespace vectors {

template <int kBytes>
using Raw =
    std::conditional_t<kBytes == 16, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

}  // namespace vectors

// All channels of a vector. Two bfloat16 are two instructions, a shift and a mask.
template <typename V, typename Raw, typename T>
__device__ __forceinline__ void widen_all(const Raw& raw, T* to) {
  if constexpr (std::is_same_v<V, __nv_bfloat16> && sizeof(Raw) >= 4) {
    uint32_t words[sizeof(Raw) / 4];
    memcpy(words, &raw, sizeof(Raw));
#pragma unroll
    for (unsigned i = 0; i < sizeof(Raw) / 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
    V parts[sizeof(Raw) / sizeof(V)];
    memcpy(parts, &raw, sizeof(Raw));
#pragma unroll
    for (unsigned i = 0; i < sizeof(Raw) / sizeof(V); ++i) {
      to[i] = widen(parts[i]);
    }
  }
}

// Loads, stores and atomic sums of kVector neighbouring channels; addresses are aligned to all of them.
struct VectorMemory {
  template <int kVector, typename V, typename T>
  __device__ __forceinline__ static void load_if(bool wanted, const V* from, T* to) {
    using Raw = vectors::Raw<kVector * sizeof(V)>;
    Raw raw{};
    if (wanted) {
      raw = __ldg(reinterpret_cast<const Raw*>(from));
    }
    widen_all<V>(raw, to);
  }

  // The same from shared memory.
  template <int kVector, typename V, typename T>
  __device__ __forceinline__ static void widen(const V* from, T* to) {
    widen_all<V>(*reinterpret_cast<const vectors::Raw<kVector * sizeof(V)>*>(from), to);
  }

  template <int kVector, typename V>
  __device__ __forceinline__ static void copy(V* to, const V* from) {
    using Raw = vectors::Raw<kVector * sizeof(V)>;
    *reinterpret_cast<Raw*>(to) = __ldg(reinterpret_cast<const Raw*>(from));
  }

  template <int kVector, typename V, typename T>
  __device__ __forceinline__ static void store(V* to, const T* from) {
    using Raw = vectors::Raw<kVector * sizeof(V)>;
    V parts[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      parts[i] = narrow<V>(from[i]);
    }
    Raw raw;
    memcpy(&raw, parts, sizeof(raw));
    *reinterpret_cast<Raw*>(to) = raw;
  }

  // Results are not used, so that these are reductions in memory and return nothing.
  template <int kVector, typename T>
  __device__ __forceinline__ static void add(T* to, const T* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (std::is_same_v<T, float> && kVector % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
      }
      return;
    } else if constexpr (std::is_same_v<T, float> && kVector == 2) {
      atomicAdd(reinterpret_cast<float2*>(to), make_float2(from[0], from[1]));
      return;
    }
#endif
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      atomicAdd(to + i, from[i]);
    }
  }
};

}  // namespace ssod
