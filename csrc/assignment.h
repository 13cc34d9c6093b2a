// Assignment of one problem by a team of threads: what a CUDA block does, tested with threads of the CPU
// (tests/cpp/assignment.cpp). csrc/cpu/shortest_paths.h has the algorithm in the form for one thread, and its reasons.
//
// Rows are taken in order. Before any path is searched, every row wants the lowest column of its minimum, and of
// several rows that want one column the first one wins: it will get the column unless a path of an earlier row ends
// there. So a column is assigned, as far as row `current` is concerned, if its owner is an earlier row, and free if its
// owner is a later one. Only rows that do not own the column they want search for a path.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "team.h"

namespace ssod {

enum AssignmentBit : int { kInvalidEntriesBit = 1, kInvalidPairBit = 2, kUnmatchedTargetBit = 4 };

SSOD_HD bool is_valid_cost(double x) { return fabs(x) < static_cast<double>(INFINITY); }

// The matrix of a problem as its solver sees it. Entries are targets, each `repeats` times. The solver's rows are the
// entries where they are fewer than the queries, else the queries.
template <typename T>
struct AssignmentMatrix {
  const T* cost;  // [targets, stride], of which the first `queries` columns count
  int64_t stride;
  int targets, queries, repeats;
  bool interleave;
  double price;  // of an entry that is not finite

  SSOD_HD int entries() const { return targets * repeats; }
  SSOD_HD bool swapped() const { return entries() >= queries; }
  SSOD_HD int rows() const { return swapped() ? queries : entries(); }
  SSOD_HD int columns() const { return swapped() ? entries() : queries; }
  SSOD_HD int target_of(int entry) const {
    return repeats == 1 ? entry : interleave ? entry / repeats : entry % targets;
  }
  SSOD_HD int copy_of(int entry) const { return repeats == 1 ? 0 : interleave ? entry % repeats : entry / targets; }
  SSOD_HD int entry_of(int target, int copy) const {
    return interleave ? target * repeats + copy : copy * targets + target;
  }
  SSOD_HD T raw(int target, int query) const { return cost[target * stride + query]; }
  SSOD_HD double priced(T x) const {
    const double value = static_cast<double>(x);
    return is_valid_cost(value) ? value : price;
  }
};

// What the team shares. Only columns beyond those that threads hold in registers need the arrays marked *.
struct AssignmentSpace {
  double* u;       // [rows] prices
  double* v;       // [columns] *
  double* length;  // [columns] * of the shortest paths
  int* column_of;  // [rows] the column that a row has, or wants before its turn
  int* row_of;     // [columns] owner, -1: nobody
  int* previous;   // [columns] the row before a column on its path
  int* at;         // [columns] the list of remaining columns
  int* rank;       // [columns] *

  SSOD_HD static int64_t bytes(int64_t rows, int64_t columns, bool in_memory) {
    return 12 * rows + (in_memory ? 32 : 12) * columns + 32;
  }

  SSOD_HD static AssignmentSpace carve(void* memory, int rows, int columns, bool in_memory) {
    AssignmentSpace s;
    const int beyond = in_memory ? columns : 0;
    s.u = static_cast<double*>(memory);
    s.v = s.u + rows;
    s.length = s.v + beyond;
    s.column_of = reinterpret_cast<int*>(s.length + beyond);
    s.row_of = s.column_of + rows;
    s.previous = s.row_of + columns;
    s.at = s.previous + columns;
    s.rank = s.at + columns;
    return s;
  }
};

// The column that is reached next: the least length, among equal ones the least rank.
struct Nearest {
  double length;
  int rank;  // place in the list of remaining columns, or -1 - place for free ones
  int column;

  SSOD_HD bool before(const Nearest& other) const {
    return length < other.length || (length == other.length && rank < other.rank);
  }
  SSOD_HD static Nearest first_of(const Nearest& a, const Nearest& b) { return b.before(a) ? b : a; }
};

constexpr int kReached = INT32_MAX;  // rank of a column that is off the list
constexpr int kBatch = 8;            // columns that a thread holds in registers
constexpr int kMemoryBatch = 2;      // columns that it loads at a time where they are too many for that

// What a column's thread knows of it.
template <int kCount>
struct ColumnBatch {
  static constexpr int kSize = kCount;
  double length[kCount], v[kCount];
  int rank[kCount];
};

// The columns that a thread owns: rank, rank + size, ... In registers if there are at most kBatch of them.
template <bool in_memory>
class OwnColumns {
 public:
  using Batch = ColumnBatch<in_memory ? kMemoryBatch : kBatch>;

  SSOD_HD OwnColumns(const AssignmentSpace& space, int rank, int size, int columns)
      : space_(space), rank_(rank), size_(size), columns_(columns) {
    each([&](Batch& batch, int, int k) { batch.v[k] = 0; });
  }

  // Calls f(batch, first column); column k of the batch is column_of(first, k), if that exists.
  template <typename F>
  SSOD_HD void each_batch(F&& f) {
    if constexpr (!in_memory) {
      f(own_, rank_);
    } else {
      for (int first = rank_; first < columns_; first += Batch::kSize * size_) {
        Batch batch;
        for (int k = 0; k < Batch::kSize; ++k) {
          if (const int c = column_of(first, k); c < columns_) {
            batch.v[k] = space_.v[c];
            batch.length[k] = space_.length[c];
            batch.rank[k] = space_.rank[c];
          }
        }
        f(batch, first);
        for (int k = 0; k < Batch::kSize; ++k) {
          if (const int c = column_of(first, k); c < columns_) {
            space_.v[c] = batch.v[k];
            space_.length[c] = batch.length[k];
            space_.rank[c] = batch.rank[k];
          }
        }
      }
    }
  }

  // Calls f(batch, column, index within the batch).
  template <typename F>
  SSOD_HD void each(F&& f) {
    each_batch([&](Batch& batch, int first) {
      for (int k = 0; k < Batch::kSize; ++k) {
        if (const int c = column_of(first, k); c < columns_) {
          f(batch, c, k);
        }
      }
    });
  }

  SSOD_HD int column_of(int first, int k) const { return first + k * size_; }

 private:
  const AssignmentSpace& space_;
  int rank_, size_, columns_;
  Batch own_;
};

// A row's minimum over valid entries and its lowest column; column -1 if there is none.
struct RowStart {
  double value;
  int column;
  int invalid;  // whether any entry is

  SSOD_HD static RowStart none() { return {INFINITY, -1, 0}; }

  SSOD_HD void offer(double x, int at) {
    if (!is_valid_cost(x)) {
      invalid = 1;
    } else if (column < 0 || x < value || (x == value && at < column)) {
      value = x;
      column = at;
    }
  }
  SSOD_HD static RowStart better(const RowStart& a, const RowStart& b) {
    RowStart best = a;
    if (b.column >= 0) {
      best.offer(b.value, b.column);
    }
    best.invalid = a.invalid | b.invalid;
    return best;
  }
};

template <typename Team, typename T>
class TeamAssignment {
 public:
  SSOD_HD TeamAssignment(Team& team, AssignmentMatrix<T>& matrix, const AssignmentSpace& space)
      : team_(team), m_(matrix), s_(space), rows_(matrix.rows()), columns_(matrix.columns()) {}

  // The minimum of a target's row, looked up by any team, such as a warp.
  template <typename Readers>
  SSOD_HD static RowStart start_of_target(Readers& readers, const AssignmentMatrix<T>& m, int target) {
    const int step = readers.size();
    const RowStart start = least_of(m.cost + target * m.stride, 1, readers.rank(), m.queries, step);
    return readers.reduce(start, [](const RowStart& a, const RowStart& b) { return RowStart::better(a, b); });
  }

  // The minimum of a query over all entries, by one thread. The first copy of a target is its lowest entry.
  SSOD_HD RowStart start_of_query(int query) const {
    RowStart start = least_of(m_.cost + query, m_.stride, 0, m_.targets, 1);
    start.column = start.column < 0 ? -1 : m_.entry_of(start.column, 0);
    return start;
  }

  // By the key of a row: the value comes from the matrix. No column where the key does not tell.
  SSOD_HD static RowStart start_from_key(const AssignmentMatrix<T>& m, int target, int64_t key) {
    const int64_t column = key & 0xffffffff;
    if (key == INT64_MIN || column >= m.queries) {
      return RowStart::none();
    }
    const double value = static_cast<double>(m.raw(target, static_cast<int>(column)));
    return is_valid_cost(value) ? RowStart{value, static_cast<int>(column), 0} : RowStart::none();
  }

  SSOD_HD void set_start(int row, const RowStart& start) {
    s_.u[row] = start.value;  // infinite: no valid entry, the price is not known yet
    s_.column_of[row] = start.column < 0 ? 0 : start.column;
  }

  SSOD_HD void set_target_start(int target, const RowStart& start) {
    for (int copy = 0; copy < m_.repeats; ++copy) {
      set_start(m_.entry_of(target, copy), start);
    }
  }

  // Starts of all rows where rows are targets: from keys, and by reading the rows whose keys do not tell. Whether any
  // of those is invalid.
  SSOD_HD bool set_target_starts(const int64_t* keys) {
    for (int t = team_.rank(); t < m_.targets; t += team_.size()) {
      const RowStart start = start_from_key(m_, t, keys[t]);
      set_target_start(t, start);
      if (start.column < 0) {
        s_.column_of[m_.entry_of(t, 0)] = -1;
      }
    }
    team_.sync();
    bool invalid = false;
    for (int t = 0; t < m_.targets; ++t) {
      if (s_.column_of[m_.entry_of(t, 0)] < 0) {
        const RowStart start = start_of_target(team_, m_, t);
        invalid |= start.invalid != 0;
        if (team_.rank() == 0) {
          set_target_start(t, start);
        }
      }
    }
    return invalid;
  }

  // Starts of all rows where rows are queries; whether this thread met an invalid entry.
  SSOD_HD bool set_query_starts() {
    bool invalid = false;
    for (int row = team_.rank(); row < rows_; row += team_.size()) {
      const RowStart start = start_of_query(row);
      invalid |= start.invalid != 0;
      set_start(row, start);
    }
    return invalid;
  }

  // Solves once all starts are set and `any_invalid` is known to every thread.
  template <bool in_memory>
  SSOD_HD void solve(bool any_invalid) {
    if (any_invalid) {
      set_price();
    }
    claim_starts();
    OwnColumns<in_memory> own(s_, team_.rank(), team_.size(), columns_);
    for (int row = next_conflict(-1); row < rows_; row = next_conflict(row)) {
      augment(own, row);
    }
  }

  // The query of an entry, or -1.
  SSOD_HD int query_of(int entry) const { return m_.swapped() ? s_.row_of[entry] : s_.column_of[entry]; }

 private:
  // The least of costs[i * stride] for i = first, first + step, ... below `count`.
  SSOD_HD static RowStart least_of(const T* costs, int64_t stride, int first, int count, int step) {
    RowStart start = RowStart::none();
    for (int i = first; i < count; i += kBatch * step) {
      T batch[kBatch];
      for (int k = 0; k < kBatch; ++k) {  // all loads before the first use
        batch[k] = i + k * step < count ? costs[(i + k * step) * stride] : T(0);
      }
      for (int k = 0; k < kBatch; ++k) {
        if (i + k * step < count) {
          start.offer(static_cast<double>(batch[k]), i + k * step);
        }
      }
    }
    return start;
  }

  // What an invalid entry costs: so much that as few as possible are taken. The margin of 1 would vanish beside 1e30.
  SSOD_HD void set_price() {
    double low = INFINITY, high = -static_cast<double>(INFINITY);
    for (int t = 0; t < m_.targets; ++t) {
      for (int q = team_.rank(); q < m_.queries; q += team_.size()) {
        const double x = static_cast<double>(m_.raw(t, q));
        low = is_valid_cost(x) && x < low ? x : low;
        high = is_valid_cost(x) && x > high ? x : high;
      }
    }
    low = team_.reduce(low, [](double a, double b) { return a < b ? a : b; });
    high = team_.reduce(high, [](double a, double b) { return a > b ? a : b; });
    const double largest = fabs(high) > fabs(low) ? fabs(high) : fabs(low), scaled = largest * 0x1p-40;
    const int pairs = rows_;
    m_.price = low > high ? 1.0 : high + static_cast<double>(pairs) * (high - low) + (scaled > 1.0 ? scaled : 1.0);
    for (int row = team_.rank(); row < rows_; row += team_.size()) {
      s_.u[row] = is_valid_cost(s_.u[row]) ? s_.u[row] : m_.price;
    }
  }

  // Of the rows that want a column the first one gets it. Each thread looks after its own columns.
  SSOD_HD void claim_starts() {
    for (int c = team_.rank(); c < columns_; c += team_.size()) {
      s_.row_of[c] = -1;
    }
    team_.sync();
    for (int row = rows_ - 1; row >= 0; --row) {
      const int column = s_.column_of[row];
      if (column % team_.size() == team_.rank()) {
        s_.row_of[column] = row;
      }
    }
    team_.sync();
  }

  // The first row behind `row` that does not have the column it wants; the number of rows if there is none.
  SSOD_HD int next_conflict(int row) {
    int next = rows_;
    for (int r = team_.rank(); r < rows_ && next == rows_; r += team_.size()) {
      if (r > row && s_.row_of[s_.column_of[r]] != r) {
        next = r;
      }
    }
    return team_.reduce(next, [](int a, int b) { return a < b ? a : b; });
  }

  // A column that has just left the list, its place, and the last column of the list, which moves there.
  struct Move {
    int reached, place, moved;
  };

  SSOD_HD bool is_free(int column, int current) const {
    const int row = s_.row_of[column];
    return row < 0 || row > current;
  }

  // Gives row `current` a column along a shortest path to a free one.
  template <bool in_memory>
  SSOD_HD void augment(OwnColumns<in_memory>& own, int current) {
    begin_search(own, current);
    Move move{-1, -1, -1};
    int row = current, remaining = columns_;
    double distance = 0, u = 0;
    Nearest next;
    while (true) {
      next = relax(own, current, row, distance, u, move);
      if (!(next.length < static_cast<double>(INFINITY))) {
        next.column = -1;  // only an overflow leads here
        break;
      }
      distance = next.length;
      if (next.rank < 0) {
        break;
      }
      move = take_off(next, --remaining);
      row = s_.row_of[next.column];
      u = s_.u[row];
    }
    update(own, next.column >= 0 ? distance : 0.0, next.column >= 0);
    team_.sync();
    if (team_.rank() == 0) {
      if (next.column >= 0) {
        s_.u[current] = distance;
        flip(current, next.column);
      } else {
        s_.u[current] = 0;
        s_.column_of[current] = -1;
      }
    }
    team_.sync();
  }

  template <bool in_memory>
  SSOD_HD void begin_search(OwnColumns<in_memory>& own, int current) {
    own.each([&](auto& batch, int c, int k) {
      const int place = columns_ - 1 - c;
      batch.length[k] = INFINITY;
      batch.rank[k] = is_free(c, current) ? -1 - place : place;
      s_.at[place] = c;
    });
  }

  // All threads know what moves; one of them writes it down. Nobody reads that place of the list in this step.
  SSOD_HD Move take_off(const Nearest& next, int last) {
    const Move move{next.column, next.rank, s_.at[last]};
    if (team_.rank() == 0 && move.place != last) {
      s_.at[move.place] = move.moved;
    }
    return move;
  }

  SSOD_HD T entry_cost(int row, int column) const {
    return m_.swapped() ? m_.raw(m_.target_of(column), row) : m_.raw(m_.target_of(row), column);
  }

  // Extends the paths by a row, after the move of the step before; the nearest column of the team.
  template <bool in_memory>
  SSOD_HD Nearest relax(OwnColumns<in_memory>& own, int current, int row, double distance, double u, const Move& move) {
    Nearest nearest{INFINITY, kReached, -1};
    own.each_batch([&](auto& batch, int first) {
      constexpr int kSize = std::remove_reference_t<decltype(batch)>::kSize;
      T costs[kSize];
      for (int k = 0; k < kSize; ++k) {  // all loads before the first use
        const int c = own.column_of(first, k);
        costs[k] = c < columns_ ? entry_cost(row, c) : T(0);
      }
      for (int k = 0; k < kSize; ++k) {
        const int c = own.column_of(first, k);
        if (c == move.reached) {
          batch.rank[k] = kReached;
        } else if (c == move.moved) {
          batch.rank[k] = is_free(c, current) ? -1 - move.place : move.place;
        }
        if (c >= columns_ || batch.rank[k] == kReached) {
          continue;
        }
        const double length = ((distance + m_.priced(costs[k])) - u) - batch.v[k];
        if (length < batch.length[k]) {
          batch.length[k] = length;
          s_.previous[c] = row;
        }
        nearest = Nearest::first_of(nearest, {batch.length[k], batch.rank[k], c});
      }
    });
    return team_.reduce(nearest, [](const Nearest& a, const Nearest& b) { return Nearest::first_of(a, b); });
  }

  // Prices with which the edges of the new path cost nothing.
  template <bool in_memory>
  SSOD_HD void update(OwnColumns<in_memory>& own, double distance, bool found) {
    if (!found) {
      return;
    }
    own.each([&](auto& batch, int c, int k) {
      if (batch.rank[k] == kReached) {
        s_.u[s_.row_of[c]] += distance - batch.length[k];
        batch.v[k] -= distance - batch.length[k];
      }
    });
  }

  // Walks back from the free column and exchanges edges.
  SSOD_HD void flip(int current, int column) {
    for (int row = -1; row != current;) {
      row = s_.previous[column];
      const int next = s_.column_of[row];
      s_.row_of[column] = row;
      s_.column_of[row] = column;
      column = next;
    }
  }

  Team& team_;
  AssignmentMatrix<T>& m_;
  const AssignmentSpace& s_;
  int rows_, columns_;
};

}  // namespace ssod
