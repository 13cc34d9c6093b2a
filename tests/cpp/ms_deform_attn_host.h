// Tensors of Python and threads of the CPU as the headers of deformable attention take them. Not part of the package.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "ms_deform_attn_rows.h"
#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename X>
using Array = py::array_t<X, py::array::c_style | py::array::forcecast>;

template <typename X>
struct PlainFloats {
  X* data;

  template <typename T>
  T load(int64_t i) const {
    return data[i];
  }
  void load_pair(int64_t i, X& x, X& y) const {
    x = data[i];
    y = data[i + 1];
  }
  PlainFloats from(int64_t i) const { return {data + i}; }
  void store(int64_t i, X x) const { data[i] = x; }
  void store_pair(int64_t i, X x, X y) const {
    data[i] = x;
    data[i + 1] = y;
  }
};

struct HostMemory {
  template <int kVector, typename T>
  static void load_if(bool wanted, const T* from, T* to) {
    for (int i = 0; i < kVector; ++i) {
      to[i] = wanted ? from[i] : T(0);
    }
  }
  template <int kVector, typename T>
  static void store(T* to, const T* from) {
    std::copy_n(from, kVector, to);
  }
  template <int kVector, typename T>
  static void add(T* to, const T* from) {
    for (int i = 0; i < kVector; ++i) {
      std::atomic_ref<T>(to[i]).fetch_add(from[i]);
    }
    adds += 1;
  }
  template <int kVector, typename T>
  static void copy(T* to, const T* from) {
    std::copy_n(from, kVector, to);
  }
  template <int kVector, typename T>
  static void widen(const T* from, T* to) {
    std::copy_n(from, kVector, to);
  }
  static inline std::atomic<int64_t> adds = 0;  // calls of add
};

template <typename X, int lanes, int vector, bool exact>
struct HostTraits {
  using T = X;
  using V = X;
  static constexpr int kLanes = lanes, kVector = vector;
  static constexpr bool kExact = exact;
  using Floats = PlainFloats<X>;
  using Memory = HostMemory;
};

// A group of lanes of a warp; `index` changes from row to row, so that every place of a board is used.
class ThreadGroup {
 public:
  using Slots = std::vector<std::array<unsigned char, 16>>;

  ThreadGroup(ssod::ThreadTeam& team, Slots& slots) : team_(team), slots_(slots) {}
  int rank() const { return team_.rank(); }
  int index() const { return index_; }
  void move(int index) { index_ = index; }
  void sync() { team_.sync(); }
  template <typename T>
  T swap(T value, int distance) {
    std::memcpy(&slots_[rank()], &value, sizeof(T));
    sync();
    T other;
    std::memcpy(&other, &slots_[rank() ^ distance], sizeof(T));
    sync();
    return other;
  }
  uint32_t ballot(bool vote) {
    slots_[rank()][0] = vote;
    sync();
    uint32_t votes = 0;
    for (int lane = 0; lane < team_.size(); ++lane) {
      votes |= uint32_t{slots_[lane][0]} << lane;
    }
    sync();
    return votes;
  }

 private:
  ssod::ThreadTeam& team_;
  Slots& slots_;
  int index_ = 0;
};

template <typename X>
struct Arguments {
  Array<X> value;  // [B, S, M, C]
  std::vector<int64_t> shapes;
  std::optional<Array<int64_t>> starts;
  bool on_device;  // sizes come as those that only the device knows
  std::vector<int32_t> points;
  std::optional<Array<X>> reference;
  Array<X> positions, weights;
  int64_t method;
  double offset_scale;

  int64_t size(int d) const { return value.shape(d); }
  int64_t queries() const { return weights.shape(1); }

  ssod::LevelSource source() const {
    ssod::LevelSource source{};
    source.shapes = on_device ? shapes.data() : nullptr;
    source.starts = starts ? starts->data() : nullptr;
    for (size_t i = 0; !on_device && i < shapes.size(); ++i) {
      source.sizes[i] = static_cast<int32_t>(shapes[i]);
    }
    std::copy(points.begin(), points.end(), source.points);
    source.count = static_cast<int32_t>(points.size());
    source.tokens = static_cast<int32_t>(size(1));
    return source;
  }

  ssod::SampleInput<X, PlainFloats<X>> samples() const {
    const int64_t heads = size(2), samples = weights.shape(3);
    const bool equal = std::equal(points.begin() + !points.empty(), points.end(), points.begin());
    const auto data = [](const Array<X>& a) { return PlainFloats<X>{const_cast<X*>(a.data())}; };
    ssod::SampleInput<X, PlainFloats<X>> in{data(positions), data(weights), heads * samples * 2, heads * samples};
    if (reference) {
      in.reference = reference->data();
      in.reference_levels = static_cast<int32_t>(reference->shape(2));
      in.reference_size = static_cast<int32_t>(reference->shape(3));
    }
    in.heads = static_cast<int32_t>(heads);
    in.samples = static_cast<int32_t>(samples);
    in.levels = static_cast<int32_t>(points.size());
    in.levels_per_sample = equal && samples > 0 ? 1.0f / static_cast<float>(points[0]) : 0.0f;
    in.method = static_cast<ssod::SampleMethod>(method);
    return in;
  }

  ssod::TokenRows<X> tokens() const {
    return {value.data(), size(1) * size(2) * size(3), static_cast<uint32_t>(size(2) * size(3) * sizeof(X)),
            static_cast<int32_t>(size(1)), static_cast<int32_t>(size(3))};
  }
};

template <typename X>
void bind(py::module_& m, const char* name) {
  py::class_<Arguments<X>>(m, name).def(
      py::init([](Array<X> value, std::vector<int64_t> shapes, std::optional<Array<int64_t>> starts, bool on_device,
                  std::vector<int32_t> points, std::optional<Array<X>> reference, Array<X> positions, Array<X> weights,
                  int64_t method, double offset_scale) {
        return Arguments<X>{value,     shapes,    starts,  on_device, points,
                            reference, positions, weights, method,    offset_scale};
      }));
}

}  // namespace
