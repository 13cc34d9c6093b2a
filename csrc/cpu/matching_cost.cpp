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
  RowRanges images;
  int64_t layers, queries;
  T* cost;
  int64_t* keys;  // null where they are not wanted

  // Rows of a layer that belong to no image.
  void fill_unowned(int64_t layer, const RowRange& range) const {
    const int64_t row = layer * images.rows + range.begin;
    std::fill_n(cost + row * queries, range.size * queries, -minus_infinity<T>());
    if (keys) {
      std::fill_n(keys + row, range.size, kUnknownKey);
    }
  }

  void solve(int64_t layer, int64_t image, CostWorkspace<T>& space) const {
    const RowRange range = images.of(image);
    if (range.size > 0) {
      const int64_t row = layer * images.rows + range.begin;
      fill_cost(call, {layer, image, range.begin, range.size, 0, queries}, space, cost + row * queries, queries,
                keys ? keys + row : nullptr);
    }
    fill_unowned(layer, gap_before(images, image));
    fill_unowned(layer, gap_behind(images, image));
  }
};

template <typename T>
void run(const Task<T>& task) {
  const int64_t batch = task.images.batch;
  if (batch == 0) {
    return task.fill_unowned(0, {0, task.layers * task.images.rows});
  }
  const int64_t work = task.images.rows / batch * task.queries * kWorkPerPair;
  parallel_rows(task.layers * batch, work, [&](int64_t begin, int64_t end) {
    CostWorkspace<T> space;
    for (int64_t i = begin; i < end; ++i) {
      task.solve(i / batch, i % batch, space);
    }
  });
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
                make_row_ranges(offsets, counts, batch, rows), layers, queries, static_cast<T*>(cost.data_ptr()),
                row_min ? static_cast<int64_t*>(keys.data_ptr()) : nullptr});
  };
  boxes.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {cost, keys};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("matching_cost", TORCH_BOX(&matching_cost)); }

}  // namespace
}  // namespace ssod
