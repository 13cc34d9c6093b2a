// Costs and assignment of one problem after the other: the cost matrix of a problem stays in the cache of its core and
// is never written out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/assignment.h"
#include "cpu/matching_cost_rows.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

constexpr int64_t kWorkPerPair = 4;
constexpr int64_t kWholeRow = 32;  // rows of whole vectors are filled fastest

// What a thread needs for any number of problems, one after the other.
template <typename T>
struct Workspace {
  CostWorkspace<T> costs;
  AssignmentWorkspace assignment;
  Scratch<T> matrix;
  Scratch<int64_t> keys;
};

// Where the rows of each image lie and where results go.
template <typename T>
struct Task {
  CostCall<T> call;
  RowRanges images;
  AssignmentRule rule;
  int64_t groups, width;  // queries of a group
  int64_t* query;         // [L, groups * repeats, G]
  T* matched;             // [L, groups * repeats, G]
  uint8_t* status;        // [L, groups, B]

  // Problem i of [L, groups, B].
  void solve(int64_t i, Workspace<T>& space) const {
    const int64_t image = i % images.batch, entry = i / images.batch, first_query = entry % groups * width;
    const RowRange range = images.of(image);
    const int64_t ld = (width + kWholeRow - 1) / kWholeRow * kWholeRow;
    T* matrix = space.matrix.reserve(range.size * ld);
    int64_t* keys = space.keys.reserve(range.size);
    fill_cost(call, {entry / groups, image, range.begin, range.size, first_query, width}, space.costs, matrix, ld,
              keys);
    const int64_t at = entry * rule.repeats * images.rows + range.begin;
    status[i] = solve_assignment<T>({matrix, ld, range.size, width, keys, first_query}, rule, space.assignment,
                                    {query + at, matched + at, images.rows});
  }
};

template <typename T>
void run(const Task<T>& task, int64_t problems) {
  const int64_t work = task.images.batch ? task.images.rows / task.images.batch * task.width * kWorkPerPair : 0;
  parallel_rows(problems, work, [&](int64_t begin, int64_t end) {
    Workspace<T> space;
    for (int64_t i = begin; i < end; ++i) {
      task.solve(i, space);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> match(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes,
                                         std::optional<Tensor> offsets, std::optional<Tensor> counts,
                                         std::optional<Tensor> image_hw, std::optional<Tensor> extra_cost,
                                         int64_t batch, int64_t class_mode, double alpha, double gamma, double eps,
                                         double w_class, double w_box, double w_giou, int64_t fmt, int64_t eps_mode,
                                         double giou_eps, int64_t groups, int64_t repeats, bool interleave,
                                         bool drop_invalid, bool any_ties) {
  const int64_t layers = boxes.size(0), rows = labels.size(0);
  Tensor query = new_output({layers, groups * repeats, rows}, ScalarType::Long);
  Tensor matched = new_output({layers, groups * repeats, rows}, boxes.scalar_type());
  Tensor status = new_output({layers, groups, batch}, ScalarType::Byte);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const auto rule = make_cost_rule<T>(class_mode, alpha, gamma, eps, w_class, w_box, w_giou, fmt, eps_mode, giou_eps);
    const Task<T> task{make_cost_call<T>(logits, boxes, labels, target_boxes, image_hw, extra_cost, rule),
                       make_row_ranges(offsets, counts, batch, rows),
                       {repeats, interleave, drop_invalid, any_ties},
                       groups,
                       boxes.size(2) / groups,
                       static_cast<int64_t*>(query.data_ptr()),
                       static_cast<T*>(matched.data_ptr()),
                       static_cast<uint8_t*>(status.data_ptr())};
    std::fill_n(task.query, query.numel(), int64_t{-1});  // this stays in rows that belong to no image
    std::fill_n(task.matched, matched.numel(), std::numeric_limits<T>::infinity());
    run(task, status.numel());
  };
  boxes.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {query, matched, status};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("match", TORCH_BOX(&match)); }

}  // namespace
}  // namespace ssod
