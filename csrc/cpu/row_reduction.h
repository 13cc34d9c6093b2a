// Augmenting row reduction (Jonker and Volgenant 1987, "A shortest augmenting path algorithm for dense and sparse
// linear assignment problems"): rows bid for columns before any path is searched. Few rows stay free, and the optimum
// is as good, but among several it is another one than shortest paths alone would find.
#pragma once

#include <vector>

#include "cpu/shortest_paths.h"

namespace ssod {

// The two least reduced costs of a row.
struct TwoLeast {
  double first, second;
  int64_t column;  // of the first
};

template <typename T>
SSOD_CLONES static TwoLeast two_least(const T* row, const double* v, int64_t columns) {
  using V = Wide<double>::Values;
  using I = Wide<int64_t>::Values;
  const int64_t whole = columns / kPathLanes, rest = columns % kPathLanes;
  const V top = V{} + INFINITY;
  V first = top, second = top;
  I vector_of = I{};
  T tail[kPathLanes];
  std::fill_n(tail, kPathLanes, static_cast<T>(INFINITY));
  std::copy_n(row + whole * kPathLanes, rest, tail);
  for (int64_t k = 0; k < whole + (rest > 0); ++k) {
    const T* costs = k < whole ? row + k * kPathLanes : tail;
    V x, price;
    for (int64_t lane = 0; lane < kPathLanes; ++lane) {
      x[lane] = static_cast<double>(costs[lane]);
    }
    load(v + k * kPathLanes, price);
    x -= price;
    const I lower = x < first;
    const V higher = lower ? first : x;
    second = higher < second ? higher : second;
    vector_of = lower ? I{} + k : vector_of;
    first = lower ? x : first;
  }
  TwoLeast least{INFINITY, INFINITY, 0};
  for (int64_t lane = 0; lane < kPathLanes; ++lane) {
    if (first[lane] < least.first) {
      least.second = std::min(least.first, second[lane]);
      least.first = first[lane];
      least.column = vector_of[lane] * kPathLanes + lane;
    } else {
      least.second = std::min(least.second, first[lane]);
    }
  }
  return least;
}

constexpr int64_t kLongestChain = 32;  // rows that drive out each other before a path is preferred

template <typename T>
class RowReduction {
 public:
  RowReduction(const CostRows<T>& costs, PathState& state, ShortestPaths<T>& paths)
      : costs_(costs), s_(state), paths_(paths) {}

  // Two rounds of bids; `free_rows` are left over.
  void run(std::vector<int64_t>& free_rows) {
    paths_.begin();
    for (int round = 0; round < 2; ++round) {
      std::vector<int64_t> left;
      for (const int64_t row : free_rows) {
        const int64_t loser = bid(row);
        if (loser >= 0) {
          left.push_back(loser);
        }
      }
      free_rows.swap(left);
    }
  }

 private:
  // Lets a row have its column, then the row that had it, and so on; the row that ends up without one, or -1. Where few
  // columns are free, prices move so little that a path is found sooner.
  int64_t bid(int64_t row) {
    for (int64_t turn = 0; turn < kLongestChain; ++turn) {
      const T* costs = costs_.row(costs_.distinct_of(row));
      TwoLeast least = two_least(costs, s_.v, costs_.columns);
      const bool dearer = least.first < least.second;
      if (dearer) {
        s_.v[least.column] -= least.second - least.first;
      } else if (s_.row_of[least.column] >= 0) {
        least.column = free_twin(costs, least);
      }
      const int64_t loser = s_.row_of[least.column];
      s_.u[row] = least.second;
      paths_.link(row, least.column);
      if (loser < 0 || !dearer) {
        return loser;
      }
      row = loser;
    }
    s_.column_of[row] = -1;
    return row;
  }

  // A free column among those of the least cost, or the first one.
  int64_t free_twin(const T* costs, const TwoLeast& least) const {
    for (int64_t j = 0; j < costs_.columns; ++j) {
      if (s_.row_of[j] < 0 && static_cast<double>(costs[j]) - s_.v[j] == least.first) {
        return j;
      }
    }
    return least.column;
  }

  const CostRows<T>& costs_;
  PathState& s_;
  ShortestPaths<T>& paths_;
};

}  // namespace ssod
