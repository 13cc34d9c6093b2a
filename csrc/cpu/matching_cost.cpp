// The matching cost of all layers and images, in parallel over their problems.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/matching_cost_rows.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

constexpr int64_t kWorkPerPair = 4;

// Where the rows of each image lie and where results go.
template <typename T>
struct Task {
  CostCall<T> call;
  const int64_t *offsets, *counts;
  int64_t layers, batch, queries, rows;
  T* cost;
  int64_t* keys;  // null where they are not wanted

  RowRange image(int64_t b) const { return image_rows(offsets, counts, batch, rows, b); }

  // Rows [begin, end) of a layer that belong to no image.
  void fill_unowned(int64_t layer, int64_t begin, int64_t end) const {
    if (begin < end) {
      std::fill(cost + (layer * rows + begin) * queries, cost + (layer * rows + end) * queries, -minus_infinity<T>());
      if (keys) {
        std::fill(keys + layer * rows + begin, keys + layer * rows + end, kNoKey);
      }
    }
  }

  // First row behind image b that may belong to no image, up to the next image: padding, or what lies behind the last.
  int64_t gap_end(int64_t b) const {
    if (offsets) {
      return b + 1 < batch ? 0 : rows;
    }
    return (b + 1) * (rows / batch);
  }

  void solve(int64_t layer, int64_t b, CostWorkspace<T>& space) const {
    const RowRange range = image(b);
    if (b == 0) {
      fill_unowned(layer, 0, range.begin);
    }
    if (range.size > 0) {
      const int64_t row = layer * rows + range.begin;
      fill_cost(call, {layer, b, range.begin, range.size, 0, queries}, space, cost + row * queries, queries,
                keys ? keys + row : nullptr);
    }
    fill_unowned(layer, range.begin + range.size, gap_end(b));
  }
};

template <typename T>
void run(const Task<T>& task) {
  if (task.batch == 0) {
    for (int64_t l = 0; l < task.layers; ++l) {
      task.fill_unowned(l, 0, task.rows);
    }
    return;
  }
  const int64_t work = task.rows / task.batch * task.queries * kWorkPerPair;
  parallel_rows(task.layers * task.batch, work, [&](int64_t begin, int64_t end) {
    CostWorkspace<T> space;
    for (int64_t i = begin; i < end; ++i) {
      task.solve(i / task.batch, i % task.batch, space);
    }
  });
}

const int64_t* optional_data(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes,
                                         std::optional<Tensor> offsets, std::optional<Tensor> counts,
                                         std::optional<Tensor> image_hw, std::optional<Tensor> extra_cost,
                                         int64_t batch, int64_t class_mode, double alpha, double gamma, double eps,
                                         double w_class, double w_box, double w_giou, int64_t fmt, int64_t eps_mode,
                                         double giou_eps, bool row_min) {
  const int64_t layers = boxes.size(0), queries = boxes.size(2), rows = labels.size(0);
  Tensor cost = new_output({layers, rows, queries}, boxes.scalar_type());
  Tensor keys = new_output(row_min ? std::vector<int64_t>{layers, rows} : std::vector<int64_t>{0}, ScalarType::Long);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const auto rule = make_cost_rule<T>(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, fmt, eps_mode, giou_eps);
    run(Task<T>{make_cost_call<T>(logits, boxes, labels, target_boxes, image_hw, extra_cost, rule),
                optional_data(offsets), optional_data(counts), layers, batch, queries, rows,
                static_cast<T*>(cost.data_ptr()), row_min ? static_cast<int64_t*>(keys.data_ptr()) : nullptr});
  };
  boxes.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {cost, keys};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("matching_cost", TORCH_BOX(&matching_cost)); }

}  // namespace
}  // namespace ssod
