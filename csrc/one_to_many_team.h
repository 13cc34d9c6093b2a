// One-to-many assignment as a team does it: a team serves a target (or an image), its members share the queries.
//
// The steps of a call are, with a barrier of the whole grid between them: claim (a team per target), settle (a query at
// a time), trim (a team per target, optional), rescue (a team per image, optional), weigh (a query at a time).
// Position i of a row belongs to member i % size of its team.
#pragma once

#include <cstdint>

#include "one_to_many.h"
#include "row_ranges.h"
#include "team.h"

namespace ssod {

// What a call reads.
struct AssignInput {
  const float* scores;  // [L, B, Q, C], or null
  const float* boxes;   // [L, B, Q, 4]
  int64_t score_strides[4], box_strides[3];
  int64_t layers, queries, classes;
  const int64_t* labels;      // [G]
  const float* target_boxes;  // [G, 4]
  RowRanges rows;             // of the images among G
  const float* priors;        // [Q, prior_width], or null
  int64_t prior_width;
  const float* image_hw;  // [B, 2], or null
  AssignOptions options;

  SSOD_HD QueryView view(int64_t layer, int64_t image) const {
    QueryView v;
    v.scores = scores ? scores + layer * score_strides[0] + image * score_strides[1] : nullptr;
    v.score_stride = score_strides[2];
    v.class_stride = score_strides[3];
    v.classes = classes;
    v.boxes = boxes + layer * box_strides[0] + image * box_strides[1];
    v.box_stride = box_strides[2];
    v.scale_x = image_hw ? image_hw[2 * image + 1] : 1.0f;
    v.scale_y = image_hw ? image_hw[2 * image] : 1.0f;
    v.priors = priors;
    v.prior_width = prior_width;
    v.count = queries;
    return v;
  }

  SSOD_HD AssignTarget target(int64_t row) const {
    return make_assign_target(target_boxes + 4 * row, labels[row], options);
  }

  SSOD_HD bool usable(int64_t row) const { return has_class(options, labels[row], classes); }
};

// What a call writes, and what its steps tell each other. `winner` and `claims` are 0 before the first step, `count`,
// `most_metric` and `most_iou` before the second.
struct AssignState {
  int64_t* target;                   // [L, B, Q]
  float *metric, *iou;               // [L, B, Q]
  float* weight;                     // [L, B, Q]
  int32_t* count;                    // [L, G]
  unsigned long long* winner;        // [L, B, Q], see pack_claim
  uint32_t* claims;                  // [L, B, Q], null where nobody asks how many targets want a query
  const float* background;           // [L, B, Q], null for rules without costs
  uint32_t *most_metric, *most_iou;  // [L, G], bits of floats >= 0

  SSOD_HD float background_of(int64_t i) const { return background ? background[i] : 0.0f; }
};

// Unsigned integers in the order of the floats.
SSOD_HD uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The largest wins: the best contest, then the lowest target. Never 0.
SSOD_HD unsigned long long pack_claim(float contest, int64_t row) {
  return (static_cast<unsigned long long>(ordered_bits(contest)) << 32) | (0xffffffffu - static_cast<uint32_t>(row));
}

SSOD_HD int64_t claimed_row(unsigned long long claim) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(claim & 0xffffffffu));
}

struct Ranked {
  float merit;
  int32_t index;  // -1: none
};

struct BetterRanked {
  SSOD_HD Ranked operator()(const Ranked& a, const Ranked& b) const {
    const bool first = a.merit > b.merit || (a.merit == b.merit && a.index >= 0 && (b.index < 0 || a.index < b.index));
    return first ? a : b;
  }
};

// The best of a member's own positions.
SSOD_HD Ranked best_of_member(const float* merits, int64_t count, int rank, int size) {
  Ranked best{minus_infinity<float>(), -1};
  for (int64_t i = rank; i < count; i += size) {
    if (merits[i] > best.merit) {
      best = {merits[i], static_cast<int32_t>(i)};
    }
  }
  return best;
}

// Calls visit(round, best) on all members for the `most` best of merits[0..count), from the best down, the lowest index
// among equals; -inf is never chosen. Overwrites what it has chosen by -inf. Returns how many there were.
template <typename Team, typename Visit>
SSOD_HD int for_each_best(Team& team, float* merits, int64_t count, int64_t most, Visit&& visit) {
  Ranked own = best_of_member(merits, count, team.rank(), team.size());
  int round = 0;
  for (; round < most; ++round) {
    const Ranked best = team.reduce(own, BetterRanked{});
    if (best.index < 0) {
      break;
    }
    visit(round, best);
    if (own.index == best.index) {
      merits[best.index] = minus_infinity<float>();
      own = best_of_member(merits, count, team.rank(), team.size());
    }
  }
  return round;
}

// Memory of a team: merits of all queries, and the queries that it has chosen.
struct AssignWorkspace {
  float* merits;    // [Q]
  int32_t* chosen;  // [chosen_capacity]
};

inline int64_t chosen_capacity(const AssignOptions& o, int64_t queries) {
  const int64_t lists = o.rule == AssignRule::atss ? o.level_count : 1;
  const int64_t most = lists * o.topk;
  return most < queries ? most : queries;
}

template <typename Team, typename Claim>
class TargetClaims {
 public:
  SSOD_HD TargetClaims(Team& team, const QueryView& queries, const AssignTarget& target, const float* background,
                       const AssignOptions& options, const AssignWorkspace& work, Claim claim)
      : team_(team),
        queries_(queries),
        target_(target),
        background_(background),
        o_(options),
        work_(work),
        claim_(claim) {}

  // Calls claim(q, value) once for each query that the target wants, on one member each.
  template <AssignRule rule>
  SSOD_HD void run() {
    if constexpr (rule == AssignRule::atss) {
      choose_standing_out();
    } else {
      choose_best<rule>();
    }
  }

 private:
  SSOD_HD float background(int64_t q) const { return background_ ? background_[q] : 0.0f; }

  template <AssignRule rule>
  SSOD_HD PairValue value(int64_t q) const {
    return value_of<rule>(queries_, target_, q, background(q), o_);
  }

  // Overlap of a query that the dynamic number of candidates counts.
  template <AssignRule rule>
  SSOD_HD float counted_iou(int64_t q) const {
    bool near = true;
    if constexpr (rule == AssignRule::tal_any) {
      const Prior p = load_prior(queries_, q);
      near = is_inside(target_, p.x, p.y, kPointMargin);
    } else if constexpr (is_cost(rule)) {
      near = background(q) != no_background();
    }
    return near ? pair_iou<rule>(target_, queries_.box(q, o_.format)) : 0.0f;
  }

  template <AssignRule rule>
  SSOD_HD int64_t dynamic_k() {
    for (int64_t q = team_.rank(); q < queries_.count; q += team_.size()) {
      const float u = counted_iou<rule>(q);
      work_.merits[q] = u > 0.0f ? u : minus_infinity<float>();
    }
    float total = 0.0f;
    for_each_best(team_, work_.merits, queries_.count, o_.topk, [&](int, const Ranked& best) { total += best.merit; });
    const auto k = static_cast<int64_t>(total);
    return k < 1 ? 1 : k;
  }

  template <AssignRule rule>
  SSOD_HD void choose_best() {
    const int64_t k = o_.dynamic_k ? dynamic_k<rule>() : o_.topk;
    for (int64_t q = team_.rank(); q < queries_.count; q += team_.size()) {
      const float merit = value<rule>(q).merit;
      work_.merits[q] = is_cost(rule) || merit > 0.0f ? merit : minus_infinity<float>();
    }
    const int chosen = collect(0, queries_.count, k, 0);
    for (int i = team_.rank(); i < chosen; i += team_.size()) {
      const int64_t q = work_.chosen[i];
      if (rule != AssignRule::tal || !queries_.priors || prior_is_inside(q)) {
        claim_(q, value<rule>(q));
      }
    }
  }

  SSOD_HD bool prior_is_inside(int64_t q) const {
    const Prior p = load_prior(queries_, q);
    return is_inside(target_, p.x, p.y, kInsideMargin);
  }

  // Appends the `most` best of positions [begin, end) to the chosen ones.
  SSOD_HD int collect(int64_t begin, int64_t end, int64_t most, int chosen) {
    const int found = for_each_best(team_, work_.merits + begin, end - begin, most, [&](int round, const Ranked& best) {
      if (team_.rank() == 0) {
        work_.chosen[chosen + round] = static_cast<int32_t>(begin) + best.index;
      }
    });
    team_.sync();
    return chosen + found;
  }

  // "atss": the nearest centres of each level, of which those whose overlap stands out.
  SSOD_HD void choose_standing_out() {
    int chosen = 0;
    int64_t begin = 0;
    for (int level = 0; level < o_.level_count; ++level) {
      const int64_t end = o_.level_end[level];
      for (int64_t q = begin + team_.rank(); q < end; q += team_.size()) {
        work_.merits[q] = nearness(q);
      }
      chosen = collect(begin, end, o_.topk, chosen);
      begin = end;
    }
    const double floor = mean_and_deviation(chosen);
    for (int i = team_.rank(); i < chosen; i += team_.size()) {
      const int64_t q = work_.chosen[i];
      const Box<float> box = queries_.box(q, o_.format);
      const PairValue v = value<AssignRule::atss>(q);
      const Prior p = center_of(queries_, q, box);
      if (static_cast<double>(v.iou) >= floor && is_inside(target_, p.x, p.y, kInsideMargin)) {
        claim_(q, v);
      }
    }
  }

  // Minus the squared distance of the centres: the root would make ties.
  SSOD_HD float nearness(int64_t q) const {
    const Prior p = center_of(queries_, q, queries_.box(q, o_.format));
    const float dx = p.x - target_.cx, dy = p.y - target_.cy;
    const float merit = -(dx * dx + dy * dy);
    return merit > minus_infinity<float>() ? merit : minus_infinity<float>();
  }

  SSOD_HD double overlap_or_zero(int64_t q) const {
    return static_cast<double>(positive(value<AssignRule::atss>(q).iou));
  }

  // Mean plus standard deviation of the overlaps of the chosen; NaN, which nothing reaches, for fewer than two.
  SSOD_HD double mean_and_deviation(int chosen) const {
    double total = 0.0, squares = 0.0;
    for (int i = 0; i < chosen; ++i) {
      total += overlap_or_zero(work_.chosen[i]);
    }
    const double mean = total / chosen;
    for (int i = 0; i < chosen; ++i) {
      const double off = overlap_or_zero(work_.chosen[i]) - mean;
      squares += off * off;
    }
    return mean + std::sqrt(squares / (chosen - 1));
  }

  Team& team_;
  const QueryView& queries_;
  const AssignTarget& target_;
  const float* background_;  // of these queries, or null
  const AssignOptions& o_;
  AssignWorkspace work_;
  Claim claim_;
};

// Step "claim" of one target.
template <AssignRule rule, typename Team, typename Claim>
SSOD_HD void claim_queries(Team& team, const AssignInput& in, const AssignState& state, int64_t layer, int64_t image,
                           int64_t row, const AssignWorkspace& work, Claim claim) {
  if (!in.usable(row)) {
    return;  // all members alike
  }
  const QueryView queries = in.view(layer, image);
  const AssignTarget target = in.target(row);
  const int64_t first = (layer * in.rows.batch + image) * in.queries;
  const float* background = state.background ? state.background + first : nullptr;
  TargetClaims<Team, Claim>(team, queries, target, background, in.options, work, claim).template run<rule>();
}

// The target among all of the image that wants query q most, given the best of those that claim it.
template <AssignRule rule>
SSOD_HD int64_t most_wanting(const AssignInput& in, const QueryView& queries, int64_t image, int64_t q,
                             float background, int64_t claimant) {
  const RowRange range = in.rows.of(image);
  float best = contest_of(value_of<rule>(queries, in.target(claimant), q, background, in.options), in.options);
  int64_t winner = claimant;
  for (int64_t row = range.begin; row < range.begin + range.size; ++row) {
    if (!in.usable(row)) {
      continue;
    }
    const PairValue v = value_of<rule>(queries, in.target(row), q, background, in.options);
    const float contest = contest_of(v, in.options);
    if (v.merit > minus_infinity<float>() && (contest > best || (contest == best && row < winner))) {
      best = contest;
      winner = row;
    }
  }
  return winner;
}

// Step "settle" of one query: writes target, metric and overlap. Returns the target or -1.
template <AssignRule rule>
SSOD_HD int64_t settle_query(const AssignInput& in, const AssignState& state, int64_t layer, int64_t image, int64_t q) {
  const int64_t i = (layer * in.rows.batch + image) * in.queries + q;
  if (state.winner[i] == 0) {
    state.target[i] = -1;
    state.metric[i] = state.iou[i] = 0.0f;
    return -1;
  }
  const QueryView queries = in.view(layer, image);
  int64_t row = claimed_row(state.winner[i]);
  if (in.options.any_target && state.claims[i] > 1) {
    row = most_wanting<rule>(in, queries, image, q, state.background_of(i), row);
  }
  const PairValue v = value_of<rule>(queries, in.target(row), q, state.background_of(i), in.options);
  state.target[i] = row;
  state.metric[i] = v.metric;
  state.iou[i] = v.iou;
  return row;
}

// Step "trim" of one target: keeps the best of its queries and counts them.
template <AssignRule rule, typename Team>
SSOD_HD void trim_target(Team& team, const AssignInput& in, const AssignState& state, int64_t layer, int64_t image,
                         int64_t row, float* merits) {
  const int64_t first = (layer * in.rows.batch + image) * in.queries;
  for (int64_t q = team.rank(); q < in.queries; q += team.size()) {
    const bool own = state.target[first + q] == row;
    merits[q] = own ? merit_of_metric<rule>(state.metric[first + q]) : minus_infinity<float>();
  }
  float most_metric = 0.0f, most_iou = 0.0f;
  const int kept = for_each_best(team, merits, in.queries, in.options.final_topk, [&](int, const Ranked& best) {
    most_metric = upper(state.metric[first + best.index], most_metric);
    most_iou = upper(state.iou[first + best.index], most_iou);
    if (best.index % team.size() == team.rank()) {
      state.target[first + best.index] = -2 - row;  // kept: not to be mistaken for one that is not
    }
  });
  for (int64_t q = team.rank(); q < in.queries; q += team.size()) {
    const int64_t i = first + q;
    if (state.target[i] == -2 - row) {
      state.target[i] = row;
    } else if (state.target[i] == row) {
      state.target[i] = -1;
      state.metric[i] = state.iou[i] = 0.0f;
    }
  }
  if (team.rank() == 0) {
    const int64_t t = layer * in.rows.rows + row;
    state.count[t] = kept;
    state.most_metric[t] = bits_as<uint32_t>(most_metric);
    state.most_iou[t] = bits_as<uint32_t>(most_iou);
  }
}

// Step "rescue" of one image: targets without a query take their best one that is still background, one after another.
template <AssignRule rule, typename Team>
SSOD_HD void rescue_targets(Team& team, const AssignInput& in, const AssignState& state, int64_t layer, int64_t image) {
  const RowRange range = in.rows.of(image);
  const QueryView queries = in.view(layer, image);
  const int64_t first = (layer * in.rows.batch + image) * in.queries;
  for (int64_t row = range.begin; row < range.begin + range.size; ++row) {
    const int64_t t = layer * in.rows.rows + row;
    if (state.count[t] > 0 || !in.usable(row)) {
      continue;  // all members alike: the count of a row is written behind the barrier of its own reduction
    }
    const AssignTarget target = in.target(row);
    Ranked own{minus_infinity<float>(), -1};
    for (int64_t q = team.rank(); q < in.queries; q += team.size()) {
      if (state.target[first + q] < 0) {
        const float merit = value_of<rule>(queries, target, q, state.background_of(first + q), in.options).merit;
        own = merit > own.merit ? Ranked{merit, static_cast<int32_t>(q)} : own;
      }
    }
    const Ranked best = team.reduce(own, BetterRanked{});
    if (best.index >= 0 && best.index % team.size() == team.rank()) {
      const int64_t i = first + best.index;
      const PairValue v = value_of<rule>(queries, target, best.index, state.background_of(i), in.options);
      state.target[i] = row;
      state.metric[i] = v.metric;
      state.iou[i] = v.iou;
      state.count[t] = 1;
      state.most_metric[t] = bits_as<uint32_t>(positive(v.metric));
      state.most_iou[t] = bits_as<uint32_t>(v.iou);
    }
  }
}

// Step "weigh" of query i of a layer.
template <AssignRule rule>
SSOD_HD void weigh_query(const AssignInput& in, const AssignState& state, int64_t layer, int64_t i) {
  const int64_t row = state.target[i];
  const int64_t t = layer * in.rows.rows + row;
  state.weight[i] = row < 0 ? 0.0f
                            : weight_of<rule>(state.metric[i], state.iou[i], bits_as<float>(state.most_metric[t]),
                                              bits_as<float>(state.most_iou[t]), in.options.eps);
}

}  // namespace ssod
