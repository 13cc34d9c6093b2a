// Shortest augmenting paths for one matrix of costs [rows, columns], rows <= columns, on one thread.
//
// Rows are added in order (Crouse 2016, "On implementing 2D rectangular assignment algorithms"). Reduced costs are
// formed in double precision and in one order of operations, and a rule decides among equal ones: the assignment is the
// one that scipy finds. Two facts save most of the work without changing it:
// - Only assigned columns have a price other than 0, and prices are never positive. So if the lowest column of a row's
//   minimum is free, the shortest path is that one edge.
// - Where a column stands in the list of remaining columns matters among equal minima alone. The list is not kept:
// `rank`
//   holds the order of preference that it implies.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/row_minimum.h"

namespace ssod {

// Memory for one thread, reused from problem to problem.
class AssignmentWorkspace {
 public:
  // n values of T, aligned to 64 bytes, valid until reset().
  template <typename T>
  T* take(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > size_) {
      size_ = std::max(2 * size_, std::max<size_t>(bytes, size_t{1} << 16));
      blocks_.emplace_back(static_cast<std::byte*>(::operator new(size_, std::align_val_t{64})));
      used_ = 0;
    }
    T* data = reinterpret_cast<T*>(blocks_.back().get() + used_);
    used_ += bytes;
    return data;
  }

  void reset() {
    if (blocks_.size() > 1) {  // keep the largest
      blocks_.erase(blocks_.begin(), blocks_.end() - 1);
    }
    used_ = 0;
  }

  // Gives back what one large problem took: threads live as long as the process.
  void shrink() {
    if (size_ > kKeptBytes) {
      blocks_.clear();
      size_ = used_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  static constexpr size_t kKeptBytes = size_t{64} << 20;

  std::vector<std::unique_ptr<std::byte, Free>> blocks_;
  size_t size_ = 0, used_ = 0;
};

// Rows of a matrix, each of which may appear several times: all of them in turn, or each in place.
template <typename T>
struct CostRows {
  const T* data;  // [distinct, stride]
  int64_t stride, distinct, repeats, columns;
  bool interleave;

  int64_t rows() const { return distinct * repeats; }
  int64_t distinct_of(int64_t row) const { return repeats == 1 ? row : interleave ? row / repeats : row % distinct; }
  const T* row(int64_t distinct_row) const { return data + distinct_row * stride; }
};

// Paths and prices. Arrays of columns are padded to whole vectors.
struct PathState {
  double *u, *v;                // prices of rows and columns
  int64_t *column_of, *row_of;  // who is assigned to whom, -1: nobody
  double* length;               // of the shortest path to each column; NaN once it was reached, and in the padding
  int64_t* previous;            // the row before each column on its path
  int64_t* rank;                // among equal lengths the least wins: free columns below 0, see rank_of
  int64_t* at;                  // the column at each place of the list of remaining ones
  double* block_low;            // vectors: lanes' minima of each block of columns
  struct Reached {
    int64_t column, place, moved;
    double length;
  };
  Reached* reached;  // assigned columns on the way of one search
};

constexpr int64_t kPathLanes = Wide<double>::kLanes;
constexpr int64_t kPathBlocks = 62;    // bits of an integer
constexpr int64_t kPathBlockSize = 4;  // vectors

inline int64_t vectors_of(int64_t columns) { return (columns + kPathLanes - 1) / kPathLanes; }

// Of several free columns the one at the last place wins, of several assigned ones that at the first.
inline int64_t rank_of(bool is_free, int64_t place) { return is_free ? -place - 1 : place; }

// Every path from one row to the columns that remain.
template <typename T>
struct Relaxation {
  const T* row;
  const double* v;
  double* length;
  int64_t* previous;
  double* block_low;
  int64_t columns, row_index;
  double distance, u;
};

// One vector of columns. `first` is the first row of a search, whose paths have nothing to be compared with.
template <bool first, typename T>
SSOD_HD void relax_lanes(const Relaxation<T>& r, const T* costs, int64_t offset, Wide<double>::Values& low) {
  using V = Wide<double>::Values;
  using I = Wide<int64_t>::Values;
  V c, v;
  for (int64_t lane = 0; lane < kPathLanes; ++lane) {
    c[lane] = static_cast<double>(costs[lane]);
  }
  load(r.v + offset, v);
  V length = ((r.distance + c) - r.u) - v;
  I previous = I{} + r.row_index;
  if constexpr (!first) {
    V old;
    I old_previous;
    load(r.length + offset, old);
    load(r.previous + offset, old_previous);
    const I shorter = length < old;
    length = shorter ? length : old;
    previous = shorter ? previous : old_previous;
  }
  store(r.length + offset, length);
  store(r.previous + offset, previous);
  low = length < low ? length : low;
}

// Extends the paths by one row; the least length. Blocks remember their minima.
template <bool first, typename T>
SSOD_CLONES static double relax(const Relaxation<T> r, int64_t block_size) {
  using V = Wide<double>::Values;
  const int64_t whole = r.columns / kPathLanes, vectors = vectors_of(r.columns);
  V lowest = V{} + INFINITY;
  int64_t block = 0;
  for (int64_t begin = 0; begin < vectors; begin += block_size, ++block) {
    const int64_t end = std::min(begin + block_size, whole);
    V low = V{} + INFINITY;
    for (int64_t k = begin; k < end; ++k) {
      relax_lanes<first>(r, r.row + k * kPathLanes, k * kPathLanes, low);
    }
    if (begin + block_size >= vectors && whole < vectors) {  // the rest of the row, filled up with NaN
      T rest[kPathLanes];
      for (int64_t lane = 0; lane < kPathLanes; ++lane) {
        const int64_t j = whole * kPathLanes + lane;
        rest[lane] = j < r.columns ? r.row[j] : static_cast<T>(NAN);
      }
      relax_lanes<first>(r, rest, whole * kPathLanes, low);
    }
    store(r.block_low + block * kPathLanes, low);
    lowest = low < lowest ? low : lowest;
  }
  return lowest_lane<double>(lowest);
}

// The least rank among the columns whose length is `lowest`.
SSOD_CLONES static int64_t least_rank(const double* length, const int64_t* rank, const double* block_low,
                                      int64_t vectors, int64_t block_size, double lowest) {
  using V = Wide<double>::Values;
  using I = Wide<int64_t>::Values;
  V low;
  I holders = I{};
  for (int64_t block = 0; block * block_size < vectors; ++block) {
    load(block_low + block * kPathLanes, low);
    holders |= (low == lowest) & (int64_t{1} << block);
  }
  int64_t bits = 0;
  for (int64_t lane = 0; lane < kPathLanes; ++lane) {
    bits |= holders[lane];
  }
  const I none = I{} + std::numeric_limits<int64_t>::max();
  I least = none;
  for (; bits != 0; bits &= bits - 1) {
    const int64_t begin = __builtin_ctzll(static_cast<unsigned long long>(bits)) * block_size;
    const int64_t end = std::min(begin + block_size, vectors);
    for (int64_t k = begin; k < end; ++k) {
      V x;
      I candidate;
      load(length + k * kPathLanes, x);
      load(rank + k * kPathLanes, candidate);
      candidate = x == lowest ? candidate : none;
      least = candidate < least ? candidate : least;
    }
  }
  return lowest_lane<int64_t>(least);
}

template <typename T>
class ShortestPaths {
 public:
  ShortestPaths(const CostRows<T>& costs, PathState& state) : costs_(costs), s_(state) {}

  static void prepare(const CostRows<T>& costs, AssignmentWorkspace& workspace, PathState& s) {
    const int64_t rows = costs.rows(), vectors = vectors_of(costs.columns), padded = vectors * kPathLanes;
    s.u = workspace.take<double>(rows);
    s.column_of = workspace.take<int64_t>(rows);
    s.v = workspace.take<double>(padded);
    s.row_of = workspace.take<int64_t>(padded);
    s.length = workspace.take<double>(padded);
    s.previous = workspace.take<int64_t>(padded);
    s.rank = workspace.take<int64_t>(padded);
    s.at = workspace.take<int64_t>(padded);
    s.block_low = workspace.take<double>((kPathBlocks + 1) * kPathLanes);
    s.reached = workspace.take<PathState::Reached>(costs.columns);
    std::fill_n(s.u, rows, 0.0);
    std::fill_n(s.column_of, rows, int64_t{-1});
    std::fill_n(s.row_of, padded, int64_t{-1});
  }

  // Fills in what searches need, before the first of them: many problems need none.
  void begin() {
    begun_ = true;
    std::fill_n(s_.v, vectors_ * kPathLanes, 0.0);
    for (int64_t column = 0; column < vectors_ * kPathLanes; ++column) {
      const int64_t place = costs_.columns - 1 - column;
      s_.rank[column] = rank_of(s_.row_of[column] < 0, place);
      s_.at[column] = place;  // places and columns are each other's mirror
    }
  }

  // Assigns a row to a free column that has its minimum.
  void assign(int64_t row, int64_t column, double minimum) {
    s_.u[row] = minimum;
    s_.row_of[column] = row;
    s_.column_of[row] = column;
    if (begun_) {
      s_.rank[column] = rank_of(false, costs_.columns - 1 - column);
    }
  }

  // Assigns a row along a shortest path. False if there is none, which only an overflow can cause.
  bool augment(int64_t start) {
    if (!begun_) {
      begin();
    }
    double distance = 0;
    const int64_t end = search(start, distance);
    if (end >= 0) {
      update(start, distance);
      flip(start, end);
    }
    restore();
    return end >= 0;
  }

  // Makes them each other's, once searches have begun.
  void link(int64_t row, int64_t column) {
    s_.row_of[column] = row;
    s_.column_of[row] = column;
    s_.rank[column] = rank_of(false, costs_.columns - 1 - column);
  }

 private:
  template <bool first>
  double relax_row(int64_t row, double distance) {
    const Relaxation<T> r{costs_.row(costs_.distinct_of(row)),
                          s_.v,
                          s_.length,
                          s_.previous,
                          s_.block_low,
                          costs_.columns,
                          row,
                          distance,
                          s_.u[row]};
    return relax<first>(r, block_size_);
  }

  // The free column at the end of the shortest path from `start`, or -1, and the length of the path.
  int64_t search(int64_t start, double& distance) {
    distance = relax_row<true>(start, 0);
    while (distance < INFINITY) {
      const int64_t rank = least_rank(s_.length, s_.rank, s_.block_low, vectors_, block_size_, distance);
      if (rank < 0) {
        return s_.at[-rank - 1];
      }
      const int64_t column = s_.at[rank];
      reach(column, rank, distance);
      distance = relax_row<false>(s_.row_of[column], distance);
    }
    return -1;
  }

  // Takes a column off the list: the last one moves to its place.
  void reach(int64_t column, int64_t place, double length) {
    const int64_t last = costs_.columns - 1 - reached_, moved = s_.at[last];
    s_.reached[reached_++] = {column, place, moved, length};
    s_.length[column] = NAN;
    s_.at[place] = moved;
    s_.rank[moved] = rank_of(s_.row_of[moved] < 0, place);
  }

  // Prices with which the edges of the new path cost nothing.
  void update(int64_t start, double distance) {
    s_.u[start] += distance;
    for (int64_t i = 0; i < reached_; ++i) {
      const PathState::Reached& r = s_.reached[i];
      s_.u[s_.row_of[r.column]] += distance - r.length;
      s_.v[r.column] -= distance - r.length;
    }
  }

  // Walks back from the free column and exchanges edges.
  void flip(int64_t start, int64_t column) {
    for (int64_t row = -1; row != start;) {
      row = s_.previous[column];
      const int64_t next = s_.column_of[row];
      link(row, column);
      column = next;
    }
  }

  // The list of columns as it is at the start of a search.
  void restore() {
    for (int64_t i = 0; i < reached_; ++i) {
      const PathState::Reached& r = s_.reached[i];
      s_.at[r.place] = costs_.columns - 1 - r.place;
      s_.rank[r.moved] = rank_of(s_.row_of[r.moved] < 0, costs_.columns - 1 - r.moved);
    }
    reached_ = 0;
  }

  CostRows<T> costs_;
  PathState& s_;
  bool begun_ = false;
  int64_t reached_ = 0;
  int64_t vectors_ = vectors_of(costs_.columns);
  int64_t block_size_ = std::max(kPathBlockSize, (vectors_ + kPathBlocks - 1) / kPathBlocks);
};

}  // namespace ssod
