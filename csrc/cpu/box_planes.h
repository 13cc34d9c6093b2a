// Boxes as planes (all x1, all y1, ...), the form in which loops over boxes vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "boxes.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "rows.h"

namespace ssod {

template <typename T>
struct Planes {
  T *x1, *y1, *x2, *y2, *area, *angle;

  // `angle` may hold anything unless `with_angle` was set in load_planes.
  SSOD_HD Box<T> at(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i], area[i], angle[i]}; }
  SSOD_HD Planes from(int64_t i) const { return {x1 + i, y1 + i, x2 + i, y2 + i, area + i, angle + i}; }
};

// Planes of a few boxes on the stack.
template <typename T, int kCapacity>
struct PlaneTile {
  alignas(64) T values[6][kCapacity];
  Planes<T> planes() { return {values[0], values[1], values[2], values[3], values[4], values[5]}; }
};

// Loops run fastest over whole vectors. Where the memory behind the end is free to write, n is rounded up to this many
// boxes.
constexpr int64_t kWholeVector = 32;

constexpr int64_t whole_vectors(int64_t n) { return (n + kWholeVector - 1) / kWholeVector * kWholeVector; }

// Planes of any number of boxes on the heap. kWholeVector boxes behind the end may be read; they mean nothing.
template <typename T>
class PlaneBuffer {
 public:
  explicit PlaneBuffer(int64_t count) : stride_(count + kWholeVector), values_(new T[6 * stride_]) {
    for (T* plane = values_.get() + count; plane < values_.get() + 6 * stride_; plane += stride_) {
      std::fill(plane, plane + kWholeVector, T(0));
    }
  }
  Planes<T> planes() const {
    T* v = values_.get();
    return {v, v + stride_, v + 2 * stride_, v + 3 * stride_, v + 4 * stride_, v + 5 * stride_};
  }

 private:
  int64_t stride_;
  std::unique_ptr<T[]> values_;
};

// How boxes are read: their format, the guard of mode "zero", and whether the angle is wanted.
struct BoxRule {
  Format format;
  bool zero;
  bool with_angle;
};

inline BoxRule make_box_rule(int64_t mode, int64_t format, int64_t eps_mode) {
  return {static_cast<Format>(format), static_cast<EpsMode>(eps_mode) == EpsMode::zero,
          static_cast<Mode>(mode) == Mode::ciou};
}

template <bool zero, typename T>
SSOD_CLONES static void unpack_rows(const T* __restrict boxes, int64_t n, Format format, const Planes<T> out) {
  for (int64_t i = 0; i < n; ++i) {  // [n, 4]
    const Box<T> box = make_box(boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3], format, zero);
    out.x1[i] = box.x1;
    out.y1[i] = box.y1;
    out.x2[i] = box.x2;
    out.y2[i] = box.y2;
    out.area[i] = box.area;
  }
}

template <typename T>
void unpack_boxes(const T* boxes, int64_t n, const BoxRule& rule, const Planes<T>& out) {
  rule.zero ? unpack_rows<true>(boxes, n, rule.format, out) : unpack_rows<false>(boxes, n, rule.format, out);
}

// A set of boxes [..., 4], addressed by the flattened index of the leading dimensions.
template <typename T>
struct BoxSet {
  const T* data;
  Rows rows;

  // Writes boxes [first, first + n) to planes.
  void load_planes(int64_t first, int64_t n, const BoxRule& rule, const Planes<T>& out) const {
    constexpr int64_t kGather = 256;
    if (rows.dense(4)) {
      unpack_boxes(data + 4 * first, n, rule, out);
    } else {
      alignas(64) T gathered[4 * kGather];
      for (int64_t i = 0; i < n; i += kGather) {
        const int64_t part = std::min(kGather, n - i);
        for (int64_t j = 0; j < part; ++j) {
          std::memcpy(gathered + 4 * j, data + rows.offset(first + i + j), 4 * sizeof(T));
        }
        unpack_boxes(gathered, part, rule, out.from(i));
      }
    }
    if (rule.with_angle) {
      for (int64_t i = 0; i < n; ++i) {
        out.angle[i] = box_angle(out.at(i), rule.zero);
      }
    }
  }
};

// The boxes of a tensor; `holder` keeps the memory alive that they point to.
template <typename T>
BoxSet<T> make_box_set(torch::stable::Tensor& holder) {
  const Rows rows = make_rows(holder, holder.dim() - 1);
  return {static_cast<const T*>(holder.data_ptr()), rows};
}

// All boxes of a set as planes.
template <typename T>
PlaneBuffer<T> unpack_all(const BoxSet<T>& set, const BoxRule& rule) {
  PlaneBuffer<T> buffer(set.rows.count);
  parallel_rows(set.rows.count, rule.with_angle ? 64 : 4, [&](int64_t begin, int64_t end) {
    set.load_planes(begin, end - begin, rule, buffer.planes().from(begin));
  });
  return buffer;
}

// Overlaps of box a with b[0..n).
template <Mode mode, bool zero, typename T>
SSOD_CLONES static void overlap_row(const Box<T> a, const Planes<T> b, const Eps<T> eps, T* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = overlap<mode, zero>(a, b.at(j), eps);
  }
}

template <typename T>
SSOD_CLONES static void nan_to_zero(T* __restrict values, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    values[j] = values[j] == values[j] ? values[j] : T(0);
  }
}

}  // namespace ssod
