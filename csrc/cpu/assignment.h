// Assignment of the targets and queries of one problem on one thread.
//
// The solver's rows are the targets where they are fewer than the queries, else the queries: then the matrix is
// transposed, and all targets may not find a query.
#pragma once

#include <cstdint>

#include "cpu/row_reduction.h"
#include "matching_cost.h"

namespace ssod {

struct AssignmentRule {
  int64_t repeats = 1;  // queries that each target takes
  bool interleave = false, drop_invalid = false, any_ties = false;
};

template <typename T>
struct AssignmentProblem {
  const T* cost;  // [targets, ld], of which the first `queries` columns count
  int64_t ld, targets, queries;
  const int64_t* keys;  // [targets]: the low half is the first query of the row's minimum, or kUnknownKey; or null
  int64_t first_query;  // what is added to every query returned
};

template <typename T>
struct AssignmentResult {
  int64_t* query;  // of copy c of target t at [c * copy_stride + t]
  T* cost;
  int64_t copy_stride;
};

enum AssignmentStatus : uint8_t { kInvalidEntries = 1, kInvalidPair = 2, kUnmatchedTarget = 4 };

// The status of the problem.
template <typename T>
uint8_t solve_assignment(const AssignmentProblem<T>& problem, const AssignmentRule& rule,
                         AssignmentWorkspace& workspace, const AssignmentResult<T>& result);

namespace assignment {

constexpr int64_t kTile = 16;

// Matrix [rows, columns] to [columns, rows * repeats].
template <typename From, typename To, typename F>
void transpose(const CostRows<From>& rows, To* out, const F& value) {
  const int64_t entries = rows.rows();
  for (int64_t e0 = 0; e0 < entries; e0 += kTile) {
    const int64_t e1 = std::min(e0 + kTile, entries);
    for (int64_t j = 0; j < rows.columns; ++j) {
      for (int64_t e = e0; e < e1; ++e) {
        out[j * entries + e] = value(rows.row(rows.distinct_of(e))[j]);
      }
    }
  }
}

// What an invalid entry costs: so much that as few as possible are taken. The margin of 1 would vanish beside 1e30.
template <typename T>
double price_of_invalid(const CostRows<T>& rows, int64_t pairs) {
  double low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < rows.distinct; ++i) {
    for (int64_t j = 0; j < rows.columns; ++j) {
      const double x = rows.row(i)[j];
      if (std::isfinite(x)) {
        low = std::min(low, x);
        high = std::max(high, x);
      }
    }
  }
  if (low > high) {
    return 1;
  }
  const double margin = std::max(1.0, std::ldexp(std::max(std::abs(high), std::abs(low)), -40));
  return high + static_cast<double>(pairs) * (high - low) + margin;
}

// Where to begin with a row: the lowest column of its minimum, from its key or by reading it.
template <typename T>
struct RowStarts {
  const CostRows<T>& rows;
  const int64_t* keys;
  int64_t* known;  // [distinct], -1: not looked at

  // False where the row is not finite.
  bool find(int64_t distinct, int64_t& column) {
    column = known[distinct];
    if (column < 0) {
      if (!from_key(distinct, column)) {
        const RowMinimum<T> least = row_minimum(rows.row(distinct), rows.columns);
        if (!least.finite) {
          return false;
        }
        column = least.column;
      }
      known[distinct] = column;
    }
    return true;
  }

 private:
  bool from_key(int64_t distinct, int64_t& column) const {
    if (!keys || keys[distinct] == kUnknownKey) {
      return false;
    }
    column = keys[distinct] & 0xffffffff;
    return column < rows.columns && std::isfinite(rows.row(distinct)[column]);
  }
};

// Adds row after row: the assignment that scipy finds.
template <typename T>
bool solve_in_order(const CostRows<T>& rows, RowStarts<T>& starts, PathState& state) {
  ShortestPaths<T> paths(rows, state);
  for (int64_t row = 0, n = rows.rows(); row < n; ++row) {
    const int64_t distinct = rows.distinct_of(row);
    int64_t column;
    if (!starts.find(distinct, column)) {
      return false;
    }
    if (state.row_of[column] < 0) {
      paths.assign(row, column, static_cast<double>(rows.row(distinct)[column]));
    } else {
      paths.augment(row);
    }
  }
  return true;
}

// Takes all free minima first and lets rows bid for columns, before paths are searched for the few rows that are left.
template <typename T>
bool solve_by_bids(const CostRows<T>& rows, RowStarts<T>& starts, PathState& state) {
  ShortestPaths<T> paths(rows, state);
  std::vector<int64_t> free_rows;
  for (int64_t row = 0, n = rows.rows(); row < n; ++row) {
    const int64_t distinct = rows.distinct_of(row);
    int64_t column;
    if (!starts.find(distinct, column)) {
      return false;
    }
    if (state.row_of[column] < 0) {
      paths.assign(row, column, static_cast<double>(rows.row(distinct)[column]));
    } else {
      free_rows.push_back(row);
    }
  }
  if (!free_rows.empty()) {
    RowReduction<T>(rows, state, paths).run(free_rows);
  }
  for (const int64_t row : free_rows) {
    paths.augment(row);
  }
  return true;
}

// Column of each row in state.column_of; false if an entry is not finite. Bids pay where rows nearly fill the columns.
template <typename T>
bool solve_rows(const CostRows<T>& rows, const int64_t* keys, bool any_ties, AssignmentWorkspace& workspace,
                PathState& state) {
  ShortestPaths<T>::prepare(rows, workspace, state);
  RowStarts<T> starts{rows, keys, workspace.take<int64_t>(rows.distinct)};
  std::fill_n(starts.known, rows.distinct, int64_t{-1});
  const bool bids = any_ties && 2 * rows.rows() > rows.columns;
  return bids ? solve_by_bids(rows, starts, state) : solve_in_order(rows, starts, state);
}

// The problem in the solver's terms.
template <typename T>
struct Task {
  const AssignmentProblem<T>& problem;
  const AssignmentRule& rule;
  AssignmentWorkspace& workspace;
  PathState& state;
  CostRows<T> targets{problem.cost, problem.ld, problem.targets, rule.repeats, problem.queries, rule.interleave};
  bool swapped = targets.rows() >= problem.queries;

  bool solve() {
    if (!swapped) {
      return solve_rows(targets, problem.keys, rule.any_ties, workspace, state);
    }
    T* matrix = workspace.template take<T>(problem.queries * targets.rows());
    transpose(targets, matrix, [](T x) { return x; });
    return solve_rows(queries_of(matrix), nullptr, rule.any_ties, workspace, state);
  }

  // With a price for entries that are not finite.
  void solve_filled() {
    const double price = price_of_invalid(targets, std::min(targets.rows(), problem.queries));
    const auto filled = [price](T x) { return std::isfinite(x) ? static_cast<double>(x) : price; };
    double* matrix = workspace.template take<double>(problem.queries * targets.rows());
    if (swapped) {
      transpose(targets, matrix, filled);
      solve_rows(queries_of(matrix), nullptr, rule.any_ties, workspace, state);
      return;
    }
    for (int64_t i = 0; i < targets.distinct; ++i) {
      std::transform(targets.row(i), targets.row(i) + problem.queries, matrix + i * problem.queries, filled);
    }
    const CostRows<double> rows{matrix,       problem.queries, problem.targets,
                                rule.repeats, problem.queries, rule.interleave};
    solve_rows(rows, nullptr, rule.any_ties, workspace, state);
  }

  // The query of a copy of a target, or -1.
  int64_t query_of(int64_t entry) const { return swapped ? state.row_of[entry] : state.column_of[entry]; }

 private:
  template <typename V>
  CostRows<V> queries_of(const V* matrix) const {
    return {matrix, targets.rows(), problem.queries, 1, targets.rows(), false};
  }
};

// Writes one entry of the result; what it adds to the status.
template <typename T>
uint8_t write(const AssignmentProblem<T>& problem, const AssignmentRule& rule, int64_t target, int64_t query,
              int64_t* out_query, T* out_cost) {
  const T cost = query < 0 ? static_cast<T>(INFINITY) : problem.cost[target * problem.ld + query];
  const bool valid = std::isfinite(cost), invalid_pair = query >= 0 && !valid;
  if (invalid_pair && rule.drop_invalid) {
    query = -1;
  }
  *out_query = query < 0 ? -1 : query + problem.first_query;
  *out_cost = valid ? cost : static_cast<T>(INFINITY);
  return static_cast<uint8_t>((invalid_pair ? kInvalidPair : 0) | (query < 0 ? kUnmatchedTarget : 0));
}

}  // namespace assignment

template <typename T>
uint8_t solve_assignment(const AssignmentProblem<T>& problem, const AssignmentRule& rule,
                         AssignmentWorkspace& workspace, const AssignmentResult<T>& result) {
  workspace.reset();
  PathState state;
  assignment::Task<T> task{problem, rule, workspace, state};
  uint8_t status = 0;
  const bool empty = problem.targets == 0 || problem.queries == 0;
  if (!empty && !task.solve()) {
    status |= kInvalidEntries;
    task.solve_filled();
  }
  const CostRows<T>& targets = task.targets;
  for (int64_t entry = 0, n = targets.rows(); entry < n; ++entry) {
    const int64_t target = targets.distinct_of(entry);
    const int64_t copy = rule.interleave ? entry % rule.repeats : entry / problem.targets;
    const int64_t at = copy * result.copy_stride + target, query = empty ? -1 : task.query_of(entry);
    status |= assignment::write(problem, rule, target, query, result.query + at, result.cost + at);
  }
  return status;
}

}  // namespace ssod
