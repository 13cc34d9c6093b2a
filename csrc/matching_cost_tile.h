// What a team of threads (csrc/team.h) does for the matching cost: one tile of queries of a layer and image against
// tiles of its targets. Threads are queries, so that rows are stored in order.
//
// The class term is computed once per distinct label of a tile of targets. Neighbouring threads then take the labels of
// one query, whose logits lie together.
#pragma once

#include "matching_cost.h"
#include "row_ranges.h"
#include "team.h"

namespace ssod {

// One call. `View` has width, query, offset(layer, image, query) and load<T>(index); see csrc/predictions.h.
template <typename T, typename View>
struct CostTask {
  CostRule<T> rule;
  View logits, boxes;
  RowRanges ranges;
  const int64_t* labels;  // [G]
  const T* target_boxes;  // [G, 4]
  const T* image_hw;      // [B, 2] or null
  const T* extra;         // [L, G, Q] or null
  int64_t extra_layer, extra_row;
  int64_t layers, queries;
  int tile;       // targets per tile, at most kTargets below
  T* cost;        // [L, G, Q]
  int64_t* keys;  // [L, G], or null where they are not wanted
};

// What the team shares. A row of `terms` has one element more than there are queries: with as many banks of memory as
// threads that read at once, neither its rows nor its columns meet a bank twice.
template <typename T, int kQueries_, int kTargets_>
struct CostTile {
  static constexpr int kQueries = kQueries_, kTargets = kTargets_;
  Box<T> box[kTargets];
  L1Box<T> l1[kTargets];
  int64_t label[kTargets];
  int first[kTargets];         // the first target with the same label
  int slot[kTargets];          // of its label among the distinct ones
  int64_t distinct[kTargets];  // their labels
  int count;                   // how many there are
  T terms[kTargets][kQueries + 1];
  T maximum[kQueries], sum[kQueries];  // of mode "softmax"
};

// Where a team works.
struct CostPlace {
  int64_t layer, image;
  int64_t query0;         // first query of the tile
  int64_t split, splits;  // it takes every splits-th tile of targets, from this one on
};

// One query, as its thread holds it.
template <typename T>
struct CostQuery {
  int64_t index;
  bool real;  // false behind the last one
  Box<T> box;
  L1Box<T> l1;
};

template <typename T>
struct ImageSize {
  T h, w;
};

template <typename T>
SSOD_HD L1Box<T> scaled(const T* box, const ImageSize<T>& size) {
  return {box[0] / size.w, box[1] / size.h, box[2] / size.w, box[3] / size.h};
}

template <typename T, typename View>
SSOD_HD CostQuery<T> read_query(const CostTask<T, View>& task, const CostPlace& place, int64_t index,
                                const ImageSize<T>& size) {
  const bool real = index < task.queries;
  const int64_t row = task.boxes.offset(place.layer, place.image, real ? index : 0);
  const T box[4] = {task.boxes.template load<T>(row), task.boxes.template load<T>(row + 1),
                    task.boxes.template load<T>(row + 2), task.boxes.template load<T>(row + 3)};
  return {index, real, make_box(box[0], box[1], box[2], box[3], task.rule.format, task.rule.zero), scaled(box, size)};
}

template <typename Tile>
SSOD_HD int distinct_before(const Tile& tile, int end) {
  int count = 0;
  for (int t = 0; t < end; ++t) {
    count += tile.first[t] == t;
  }
  return count;
}

// Loads targets [row, row + count) and numbers their distinct labels in order of appearance.
template <typename Team, typename T, typename View, typename Tile>
SSOD_HD void read_targets(Team& team, const CostTask<T, View>& task, int64_t row, int count, const ImageSize<T>& size,
                          Tile& tile) {
  for (int t = team.rank(); t < count; t += team.size()) {
    const T* box = task.target_boxes + 4 * (row + t);
    tile.box[t] = make_box(box[0], box[1], box[2], box[3], task.rule.format, task.rule.zero);
    tile.l1[t] = scaled(box, size);
    tile.label[t] = task.labels[row + t];
  }
  team.sync();
  for (int t = team.rank(); t < count; t += team.size()) {
    int first = 0;
    while (tile.label[first] != tile.label[t]) {
      ++first;
    }
    tile.first[t] = first;
  }
  team.sync();
  for (int t = team.rank(); t < count; t += team.size()) {
    tile.slot[t] = distinct_before(tile, tile.first[t]);
    if (tile.first[t] == t) {
      tile.distinct[tile.slot[t]] = tile.label[t];
    }
    if (t == count - 1) {
      tile.count = distinct_before(tile, count);
    }
  }
  team.sync();
}

template <typename T>
SSOD_HD T class_term(T x, const CostRule<T>& rule, T maximum, T sum) {
  switch (rule.class_mode) {
    case ClassMode::softmax:
      return softmax_cost(x, maximum, sum);
    case ClassMode::prob:
      return -x;
    case ClassMode::focal:
      return rule.square ? focal_cost<ClassMode::focal, true>(x, rule) : focal_cost<ClassMode::focal, false>(x, rule);
    default:
      return rule.square ? focal_cost<ClassMode::focal_logits, true>(x, rule)
                         : focal_cost<ClassMode::focal_logits, false>(x, rule);
  }
}

// Weighted class terms of the distinct labels for the tile's queries; NaN for a label out of range.
template <typename Team, typename T, typename View, typename Tile>
SSOD_HD void compute_terms(Team& team, const CostTask<T, View>& task, const CostPlace& place, Tile& tile) {
  const int64_t left = task.queries - place.query0;
  const int queries = left < Tile::kQueries ? static_cast<int>(left) : Tile::kQueries;
  const int step_q = team.size() / tile.count, step_u = team.size() % tile.count;
  int q = team.rank() / tile.count, u = team.rank() % tile.count;
  while (q < queries) {
    const int64_t label = tile.distinct[u];
    T x = static_cast<T>(NAN);
    if (label >= 0 && label < task.logits.width) {
      x = task.logits.template load<T>(task.logits.offset(place.layer, place.image, place.query0 + q) + label);
    }
    tile.terms[u][q] = task.rule.w_class * class_term(x, task.rule, tile.maximum[q], tile.sum[q]);
    q += step_q;
    u += step_u;
    if (u >= tile.count) {
      u -= tile.count;
      ++q;
    }
  }
  team.sync();
}

// Costs of the tile's targets, which are the rows [row, row + count) of the layer. `offer` takes each of them to the
// key of its row.
template <bool zero, typename Team, typename T, typename View, typename Tile, typename Offer>
SSOD_HD void write_tile(Team& team, const CostTask<T, View>& task, const CostPlace& place, int64_t row, int count,
                        const CostQuery<T>& query, const Tile& tile, Offer& offer) {
  const bool classes = task.rule.class_mode != ClassMode::none;
  for (int t = team.rank() / Tile::kQueries; t < count; t += team.size() / Tile::kQueries) {
    const T term = classes ? tile.terms[tile.slot[t]][team.rank() % Tile::kQueries] : T(0);
    T cost = pair_cost<zero>(query.box, query.l1, tile.box[t], tile.l1[t], term, task.rule);
    const int64_t line = place.layer * task.ranges.rows + row + t;
    if (query.real) {
      if (task.extra) {
        cost += task.extra[place.layer * task.extra_layer + (row + t) * task.extra_row + query.index];
      }
      task.cost[line * task.queries + query.index] = cost;
    }
    if (task.keys) {
      offer(cost, query, task.keys + line);
    }
  }
}

// Rows that belong to no image, at the tile's queries.
template <typename Tile, typename Team, typename T, typename View>
SSOD_HD void fill_gap(Team& team, const CostTask<T, View>& task, int64_t layer, const RowRange& gap, int64_t query) {
  for (int64_t r = team.rank() / Tile::kQueries; r < gap.size; r += team.size() / Tile::kQueries) {
    const int64_t line = layer * task.ranges.rows + gap.begin + r;
    if (query < task.queries) {
      task.cost[line * task.queries + query] = -minus_infinity<T>();
    }
    if (task.keys && query == 0) {
      task.keys[line] = kUnknownKey;
    }
  }
}

// All of it. The size of the team is a multiple of Tile::kQueries. `softmax` fills the tile's maxima and sums and is
// called by the whole team; keys must hold INT64_MAX before.
template <bool zero, typename Team, typename T, typename View, typename Tile, typename Softmax, typename Offer>
SSOD_HD void fill_cost_tile(Team& team, const CostTask<T, View>& task, const CostPlace& place, Tile& tile,
                            Softmax&& softmax, Offer&& offer) {
  const int64_t index = place.query0 + team.rank() % Tile::kQueries;
  const T* hw = task.image_hw + 2 * place.image;
  const ImageSize<T> size = task.image_hw ? ImageSize<T>{hw[0], hw[1]} : ImageSize<T>{T(1), T(1)};
  const CostQuery<T> query = read_query(task, place, index, size);
  const RowRange range = task.ranges.of(place.image);
  if (task.rule.class_mode == ClassMode::softmax && range.size > 0) {
    softmax(team, task, place, tile);
  }
  for (int64_t t = place.split * task.tile; t < range.size; t += place.splits * task.tile) {
    const int count = range.size - t < task.tile ? static_cast<int>(range.size - t) : task.tile;
    read_targets(team, task, range.begin + t, count, size, tile);
    if (task.rule.class_mode != ClassMode::none) {
      compute_terms(team, task, place, tile);
    }
    write_tile<zero>(team, task, place, range.begin + t, count, query, tile, offer);
    team.sync();  // before the next tile
  }
  if (place.split == 0) {
    fill_gap<Tile>(team, task, place.layer, gap_before(task.ranges, place.image), index);
    fill_gap<Tile>(team, task, place.layer, gap_behind(task.ranges, place.image), index);
  }
  team.sync();  // before the next problem
}

}  // namespace ssod
