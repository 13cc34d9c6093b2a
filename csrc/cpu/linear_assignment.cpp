// Assignment of all problems of a batch: one task per (layer, group, image).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/assignment.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "row_ranges.h"

namespace ssod {
namespace {

template <typename T>
struct Batch {
  const T* cost;  // [layers, rows, queries]
  const int64_t* keys;
  RowRanges rows;
  int64_t layers, queries, groups;
  AssignmentRule rule;
  int64_t* query;  // [layers, groups * repeats, rows]
  T* matched;
  uint8_t* status;  // [layers, groups, batch]

  int64_t problems() const { return layers * groups * rows.batch; }

  void solve(int64_t problem, AssignmentWorkspace& workspace) const {
    const int64_t image = problem % rows.batch, group = problem / rows.batch % groups;
    const int64_t layer = problem / rows.batch / groups;
    const RowRange range = rows.of(image);
    const int64_t first_row = layer * rows.rows + range.begin, width = queries / groups, first = group * width;
    const int64_t out = (problem / rows.batch) * rule.repeats * rows.rows + range.begin;
    const AssignmentProblem<T> one{cost + first_row * queries + first, queries, range.size, width,
                                   keys ? keys + first_row : nullptr,  first};
    status[problem] = solve_assignment(one, rule, workspace, {query + out, matched + out, rows.rows});
  }
};

template <typename T>
void solve_all(const Batch<T>& batch) {
  const int64_t problems = batch.problems();
  const int64_t entries = batch.layers * batch.rows.rows * batch.queries;
  parallel_rows(problems, entries / std::max<int64_t>(1, problems), [&](int64_t begin, int64_t end) {
    static thread_local AssignmentWorkspace workspace;
    for (int64_t problem = begin; problem < end; ++problem) {
      batch.solve(problem, workspace);
    }
    workspace.shrink();
  });
}

const int64_t* integers(const std::optional<Tensor>& t) {
  return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> linear_assignment(Tensor cost, std::optional<Tensor> offsets,
                                                     std::optional<Tensor> counts, std::optional<Tensor> keys,
                                                     int64_t batch, int64_t groups, int64_t repeats, bool interleave,
                                                     bool drop_invalid, bool any_ties) {
  const int64_t layers = cost.size(0), rows = cost.size(1), queries = cost.size(2);
  Tensor query = new_output({layers, groups * repeats, rows}, ScalarType::Long);
  Tensor matched = new_output({layers, groups * repeats, rows}, cost.scalar_type());
  Tensor status = new_output({layers, groups, batch}, ScalarType::Byte);
  const auto run = [&](auto t) {
    using T = decltype(t);
    auto* found = static_cast<int64_t*>(query.data_ptr());
    auto* costs = static_cast<T*>(matched.data_ptr());
    if (offsets || counts || batch == 0) {  // rows of no image
      std::fill_n(found, query.numel(), int64_t{-1});
      std::fill_n(costs, matched.numel(), static_cast<T>(INFINITY));
    }
    const bool use_keys = groups == 1 && sizeof(T) == sizeof(float);
    solve_all(Batch<T>{static_cast<const T*>(cost.data_ptr()),
                       use_keys ? integers(keys) : nullptr,
                       {integers(offsets), integers(counts), rows, batch},
                       layers,
                       queries,
                       groups,
                       {repeats, interleave, drop_invalid, any_ties},
                       found,
                       costs,
                       static_cast<uint8_t*>(status.data_ptr())});
  };
  cost.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {query, matched, status};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("linear_assignment", TORCH_BOX(&linear_assignment)); }

}  // namespace
}  // namespace ssod
