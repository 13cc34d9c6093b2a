// How CUDA kernels read boxes and which boxes meet which.
#pragma once

#include <optional>

#include "boxes.h"
#include "cuda/common.cuh"
#include "rows.h"

namespace ssod {

// How boxes are scored and read; a plain value, passed to kernels as it is.
template <typename T>
struct BoxRule {
  Format format;
  Eps<T> eps;
  bool zero;
  bool nan_zero;
};

template <typename T>
BoxRule<T> make_box_rule(int64_t fmt, int64_t eps_mode, double eps, bool nan_zero) {
  const auto mode = static_cast<EpsMode>(eps_mode);
  return {static_cast<Format>(fmt), make_eps<T>(mode, eps), mode == EpsMode::zero, nan_zero};
}

// A set of boxes [..., 4]; `vector` says that every box starts on a 16-byte boundary.
template <typename T>
struct BoxSet {
  const T* data;
  Rows rows;
  bool vector;

  __device__ __forceinline__ void read(int64_t i, T (&v)[4]) const {
    const T* p = data + rows.offset(i);
    if constexpr (sizeof(T) == 4) {
      if (vector) {
        const float4 q = *reinterpret_cast<const float4*>(p);
        v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
        return;
      }
    }
    v[0] = p[0], v[1] = p[1], v[2] = p[2], v[3] = p[3];
  }

  template <Mode mode>
  __device__ __forceinline__ Box<T> load(int64_t i, const BoxRule<T>& rule) const {
    T v[4];
    read(i, v);
    Box<T> box = make_box(v[0], v[1], v[2], v[3], rule.format, rule.zero);
    if constexpr (mode == Mode::ciou) {
      box.angle = box_angle(box, rule.zero);
    }
    return box;
  }
};

template <typename T>
BoxSet<T> make_box_set(Tensor& holder) {
  const Rows rows = make_rows(holder, holder.dim() - 1);
  const auto* data = static_cast<const T*>(holder.data_ptr());
  bool vector = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < rows.dims; ++d) {
    vector = vector && rows.stride[d] % 4 == 0;
  }
  return {data, rows, vector};
}

template <typename T>
__device__ __forceinline__ void store_grads(T* out, const CornerGrads<T>& corners, Format format) {
  const CornerGrads<T> g = to_format(corners, format);
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(out) = make_float4(g.x1, g.y1, g.x2, g.y2);
  } else {
    out[0] = g.x1, out[1] = g.y1, out[2] = g.x2, out[3] = g.y2;
  }
}

// A range of boxes of the flattened set.
struct Range {
  int64_t begin, size;
};

// Which boxes of one set a box of the other meets: all of its batch item, or, with offsets, all of its image.
struct Partners {
  const int64_t* own;    // offsets of the set that the box belongs to, null for dense input
  const int64_t* other;  // offsets of its partners
  int64_t images;
  int64_t own_per_item, other_per_item;  // dense input
  int64_t own_count, other_count;

  static __device__ __forceinline__ int64_t clamped(int64_t x, int64_t high) {
    return x < 0 ? 0 : (x > high ? high : x);
  }

  // Image of box i, or -1. Works on any offsets without leaving their array; right for offsets that rise.
  __device__ int64_t image_of(int64_t i) const {
    int64_t low = 0, high = images;  // the last image whose offset is <= i lies in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (own[middle] <= i ? low : high) = middle;
    }
    return images > 0 && own[low] <= i && i < own[low + 1] ? low : -1;
  }

  __device__ Range of(int64_t i) const {
    if (!own) {
      return {i / own_per_item * other_per_item, other_per_item};
    }
    const int64_t image = image_of(i);
    if (image < 0) {
      return {0, 0};
    }
    const int64_t begin = clamped(other[image], other_count), end = clamped(other[image + 1], other_count);
    return {begin, end > begin ? end - begin : 0};
  }

  // First box of the image (or batch item) that owns box i.
  __device__ int64_t start_of(int64_t i) const {
    if (!own) {
      return i / own_per_item * own_per_item;
    }
    const int64_t image = image_of(i);
    return image < 0 ? 0 : clamped(own[image], own_count);
  }
};

inline Partners make_partners(const Tensor& own, const Tensor& other, const std::optional<Tensor>& own_offsets,
                              const std::optional<Tensor>& other_offsets) {
  Partners p{};
  p.own_count = own.numel() / 4;
  p.other_count = other.numel() / 4;
  p.own_per_item = own.dim() > 1 ? own.size(own.dim() - 2) : 1;
  p.other_per_item = other.dim() > 1 ? other.size(other.dim() - 2) : 1;
  if (own_offsets) {
    p.own = static_cast<const int64_t*>(own_offsets->data_ptr());
    p.other = static_cast<const int64_t*>(other_offsets->data_ptr());
    p.images = own_offsets->numel() - 1;
  }
  return p;
}

// Calls f with a value of the compute type of `t`.
template <typename F>
void with_compute_type(const Tensor& t, F&& f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace ssod
