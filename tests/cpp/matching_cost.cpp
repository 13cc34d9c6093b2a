// Runs csrc/matching_cost.h pair by pair, and csrc/matching_cost_tile.h with a team of CPU threads as a CUDA block runs
// it. Not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <mutex>
#include <optional>

#include "matching_cost_tile.h"
#include "thread_team.h"

namespace {

namespace py = pybind11;
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// A contiguous array [L, B, Q, K].
template <typename X>
struct ArrayView {
  const X* data;
  int64_t images, queries, width;

  int64_t offset(int64_t l, int64_t b, int64_t q) const { return ((l * images + b) * queries + q) * width; }
  template <typename T>
  T load(int64_t i) const {
    return static_cast<T>(data[i]);
  }
};

template <typename X>
ArrayView<X> view(const Array<X>& array) {
  return {array.data(), array.shape(1), array.shape(2), array.shape(3)};
}

template <typename T>
const T* optional_data(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

// Few queries and targets per tile, so that small problems have several of both.
template <typename T>
using Tile = ssod::CostTile<T, 4, 6>;

template <typename T>
struct SerialSoftmax {
  void operator()(ssod::ThreadTeam& team, const ssod::CostTask<T, ArrayView<T>>& task, const ssod::CostPlace& place,
                  Tile<T>& tile) const {
    for (int q = team.rank(); q < Tile<T>::kQueries && place.query0 + q < task.queries; q += team.size()) {
      const T* row = task.logits.data + task.logits.offset(place.layer, place.image, place.query0 + q);
      tile.maximum[q] = -INFINITY;
      for (int64_t c = 0; c < task.logits.width; ++c) {
        tile.maximum[q] = ssod::upper(row[c], tile.maximum[q]);
      }
      tile.sum[q] = 0;
      for (int64_t c = 0; c < task.logits.width; ++c) {
        tile.sum[q] += ssod::exp_down(row[c] - tile.maximum[q]);
      }
    }
  }
};

template <typename T>
struct LockedKeys {
  std::mutex& lock;

  void operator()(T cost, const ssod::CostQuery<T>& query, int64_t* key) const {
    if (query.real) {
      const std::lock_guard guard(lock);
      const int64_t own = ssod::row_key(ssod::orderable(static_cast<float>(cost)), query.index);
      *key = std::min(*key, ssod::is_valid_cost(cost) ? own : ssod::kUnknownKey);
    }
  }
};

// Arguments in the order of the op, after the shape of the team; every tile of queries and split of the targets in
// turn.
template <typename T>
py::tuple matching_cost(int threads, int tile, int splits, const Array<T>& logits, const Array<T>& boxes,
                        const Array<int64_t>& labels, const Array<T>& target_boxes,
                        const std::optional<Array<int64_t>>& offsets, const std::optional<Array<int64_t>>& counts,
                        const std::optional<Array<T>>& image_hw, const std::optional<Array<T>>& extra, int64_t batch,
                        int64_t class_mode, double alpha, double gamma, double eps, double w_class, double w_box,
                        double w_giou, int64_t fmt, int64_t eps_mode, double giou_eps) {
  const int64_t layers = boxes.shape(0), queries = boxes.shape(2), rows = labels.shape(0);
  Array<T> cost({layers, rows, queries});
  Array<int64_t> keys({layers, rows});
  std::fill_n(cost.mutable_data(), cost.size(), static_cast<T>(NAN));
  std::fill_n(keys.mutable_data(), keys.size(), INT64_MAX);
  const ssod::CostTask<T, ArrayView<T>> task{
      ssod::make_cost_rule<T>(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, fmt, eps_mode, giou_eps),
      view(logits),
      view(boxes),
      {optional_data(offsets), optional_data(counts), rows, batch},
      labels.data(),
      target_boxes.data(),
      optional_data(image_hw),
      optional_data(extra),
      rows * queries,
      queries,
      layers,
      queries,
      tile,
      cost.mutable_data(),
      keys.mutable_data()};
  Tile<T> shared;
  std::mutex lock;
  ssod::run_team(threads, [&](ssod::ThreadTeam& team) {
    for (int64_t problem = 0; problem < layers * batch; ++problem) {
      for (int64_t query0 = 0; query0 < queries; query0 += Tile<T>::kQueries) {
        for (int64_t split = 0; split < splits; ++split) {
          const ssod::CostPlace place{problem / batch, problem % batch, query0, split, splits};
          const auto run = [&](auto zero) {
            ssod::fill_cost_tile<zero()>(team, task, place, shared, SerialSoftmax<T>{}, LockedKeys<T>{lock});
          };
          task.rule.zero ? run(std::true_type{}) : run(std::false_type{});
        }
      }
    }
  });
  return py::make_tuple(cost, keys);
}

template <float (*function)(float)>
Array<float> each(const Array<float>& x) {
  Array<float> out(x.size());
  std::transform(x.data(), x.data() + x.size(), out.mutable_data(), function);
  return out;
}

float exp_down(float x) { return ssod::exp_down(x); }
float log_normal(float x) { return ssod::log_normal(x); }
float log_near_one(float x) { return ssod::log_near_one(x); }

}  // namespace

PYBIND11_MODULE(matching_cost, m) {
  m.def("exp_down", &each<exp_down>);
  m.def("log_normal", &each<log_normal>);
  m.def("log_near_one", &each<log_near_one>);
  m.def("matching_cost_f32", &matching_cost<float>);
  m.def("matching_cost_f64", &matching_cost<double>);
}
