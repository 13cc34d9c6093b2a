// One-to-many assignment of one image on one layer.
//
// Overlaps are computed for whole rows of queries; scores, logarithms and aspect terms only for queries that may still
// be among the best of a target.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/best_queries.h"
#include "cpu/box_planes.h"
#include "cpu/class_background.h"
#include "one_to_many_team.h"

namespace ssod {

// Priors as planes, padded to whole chunks by points that lie nowhere.
struct PriorPlanes {
  std::vector<float> x, y, stride_x, stride_y;

  PriorPlanes(const float* priors, int64_t width, int64_t count) {
    for (auto* plane : {&x, &y, &stride_x, &stride_y}) {
      plane->assign(priors ? count + kChunk : 0, static_cast<float>(NAN));
    }
    for (int64_t q = 0; priors && q < count; ++q) {
      const float* v = priors + q * width;
      x[q] = v[0];
      y[q] = v[1];
      stride_x[q] = width > 2 ? v[2] : 1.0f;
      stride_y[q] = width > 2 ? v[3] : 1.0f;
    }
  }
};

// Bit j: the prior lies in the central region of "simota".
SSOD_CLONES static uint64_t points_central(const float* __restrict x, const float* __restrict y,
                                           const float* __restrict stride_x, const float* __restrict stride_y, float cx,
                                           float cy) {
  uint32_t half[2] = {0, 0};
  for (int h = 0; h < 2; ++h) {
    uint32_t bits = 0;
    for (int k = 0; k < 32; ++k) {
      const int j = 32 * h + k;
      const float dx = x[j] - cx, dy = y[j] - cy, rx = kCenterRadius * stride_x[j], ry = kCenterRadius * stride_y[j];
      const bool in = (rx + dx > 0.0f) & (ry + dy > 0.0f) & (rx - dx > 0.0f) & (ry - dy > 0.0f);
      bits |= static_cast<uint32_t>(in) << k;
    }
    half[h] = bits;
  }
  return half[0] | static_cast<uint64_t>(half[1]) << 32;
}

// Upper bounds of the metric: iou^exponent, which a probability can only lower.
template <int kExponent>
SSOD_CLONES static void power_row(const float* __restrict iou, float* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = whole_power(iou[j], kExponent);
  }
}

// Minus the squared distances of centres from a point; -inf where there is none.
SSOD_CLONES static void nearness_row(const float* __restrict x, const float* __restrict y, float cx, float cy,
                                     float* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float dx = x[j] - cx, dy = y[j] - cy;
    const float merit = -(dx * dx + dy * dy);
    out[j] = merit > minus_infinity<float>() ? merit : minus_infinity<float>();
  }
}

// A query that costs less than `cost` overlaps by more than this: class and centre terms only add to -3 ln(u + eps).
inline float least_overlap(float cost, float eps) {
  const float slack = 0.01f + 1e-5f * std::abs(cost);  // for rounding
  return std::exp(-(cost + slack) / kIouWeight) - eps;
}

struct Owned {
  int32_t query;
  int32_t target;  // counted within the image
  float metric, iou, contest;
};

struct AssignOutput {
  int64_t* target;               // [L, B, Q]
  float *metric, *iou, *weight;  // [L, B, Q]
  int32_t* count;                // [L, G]
};

constexpr int64_t kBlock = 4;  // chunks whose scores are fetched together

template <AssignRule rule>
class ImageAssigner {
 public:
  ImageAssigner(const AssignInput& in, const PriorPlanes& priors, const AssignOutput& out)
      : in_(in),
        o_(in.options),
        priors_(priors),
        out_(out),
        count_(in.queries),
        box_buffer_(in.queries),
        boxes_(box_buffer_.planes()),
        iou_(in.queries + kChunk),
        bound_(in.queries + kChunk),
        wanted_(in.queries),
        owner_(in.queries, -1) {
    if constexpr (is_cost(rule)) {
      background_.resize(count_);
      known_.resize(count_);
    }
  }

  // Fills the rows of the outputs that belong to the image; `count` is 0 before.
  void run(int64_t layer, int64_t image) {
    load(layer, image);
    for (size_t t = 0; t < targets_.size(); ++t) {
      if (usable_[t]) {
        choose(static_cast<int32_t>(t));
      }
    }
    if (o_.any_target) {
      settle_contested();
    }
    if (o_.final_topk > 0) {
      trim();
    }
    tally();
    if (o_.keep_one) {
      rescue();
    }
    write(layer, image);
  }

 private:
  int64_t chunks() const { return (count_ + kChunk - 1) / kChunk; }

  void load(int64_t layer, int64_t image) {
    view_ = in_.view(layer, image);
    rows_ = in_.rows.of(image);
    targets_.resize(rows_.size);
    usable_.resize(rows_.size);
    for (int64_t t = 0; t < rows_.size; ++t) {
      targets_[t] = in_.target(rows_.begin + t);
      usable_[t] = in_.usable(rows_.begin + t);
    }
    owned_.clear();
    if (rows_.size == 0) {
      return;
    }
    load_boxes();
    if constexpr (is_cost(rule)) {
      load_priors();
    } else if constexpr (rule == AssignRule::atss) {
      load_centers();
    }
  }

  void load_boxes() {
    constexpr int64_t kPart = 256;
    alignas(64) float part[4 * kPart];
    const BoxRule how{o_.format, false, false};
    for (int64_t q = 0; q < count_; q += kPart) {
      const int64_t n = std::min(kPart, count_ - q);
      for (int64_t i = 0; i < n; ++i) {
        const float* v = view_.boxes + (q + i) * view_.box_stride;
        part[4 * i] = v[0] * view_.scale_x;
        part[4 * i + 1] = v[1] * view_.scale_y;
        part[4 * i + 2] = v[2] * view_.scale_x;
        part[4 * i + 3] = v[3] * view_.scale_y;
      }
      unpack_boxes(part, n, how, boxes_.from(q));
    }
  }

  // Which priors any target admits, and which lie in box and central region of each.
  void load_priors() {
    admitted_.assign(chunks(), 0);
    centered_.assign(chunks() * targets_.size(), 0);
    std::fill(known_.begin(), known_.end(), 0);
    for (size_t t = 0; t < targets_.size(); ++t) {
      if (!usable_[t]) {
        continue;
      }
      for (int64_t c = 0; c < chunks(); ++c) {
        const uint64_t within = in_box(targets_[t], c, 0.0f);
        uint64_t central = within;
        if constexpr (rule == AssignRule::simota) {
          central = points_central(&priors_.x[c * kChunk], &priors_.y[c * kChunk], &priors_.stride_x[c * kChunk],
                                   &priors_.stride_y[c * kChunk], targets_[t].cx, targets_[t].cy);
        }
        admitted_[c] |= within | central;
        centered_[t * chunks() + c] = within & central;
      }
    }
  }

  void load_centers() {
    center_x_.resize(count_ + kChunk);
    center_y_.resize(count_ + kChunk);
    for (int64_t q = 0; q < count_; ++q) {
      const Prior p = center_of(view_, q, boxes_.at(q));
      center_x_[q] = p.x;
      center_y_[q] = p.y;
    }
  }

  uint64_t in_box(const AssignTarget& t, int64_t c, float margin) const {
    return points_inside(&priors_.x[c * kChunk], &priors_.y[c * kChunk], {t.x1, t.y1, t.x2, t.y2}, margin) &
           bits_before(c, count_);
  }

  // Queries of chunk c whose value in `row` exceeds the bound.
  uint64_t above_in(const std::vector<float>& row, int64_t c, float bound) const {
    return above(&row[c * kChunk], bound) & bits_before(c, count_);
  }

  float background(int64_t q) {
    if constexpr (!is_cost(rule)) {
      return 0.0f;
    } else {
      if (!known_[q]) {
        known_[q] = 1;
        background_[q] = sum_background<rule>(view_.scores + q * view_.score_stride, view_.class_stride, view_.classes,
                                              o_.from_logits, scores_);
      }
      return background_[q];
    }
  }

  PairValue value(const AssignTarget& t, int64_t q, float iou) {
    return value_of<rule>(view_, t, q, iou, background(q), o_);
  }

  void overlaps_of(const AssignTarget& t) {
    overlap_row<Mode::iou, false>(t.box, boxes_, iou_eps(), iou_.data(), whole_vectors(count_));
  }

  void choose(int32_t t) {
    const AssignTarget& target = targets_[t];
    if constexpr (rule == AssignRule::atss) {
      overlaps_of(target);
      choose_standing_out(t);
      return;
    }
    if constexpr (rule != AssignRule::tal_any) {
      overlaps_of(target);
    }
    best_.start(std::min<int64_t>(o_.dynamic_k ? dynamic_k(target, t) : o_.topk, count_));
    if constexpr (rule == AssignRule::tal) {
      offer_aligned(target);
    } else if constexpr (rule == AssignRule::tal_any) {
      offer_inside(target);
    } else {
      offer_cheapest(target, t);
    }
    for (const BestQueries::Entry& e : best_) {
      if (rule != AssignRule::tal || !view_.priors || prior_is_inside(target, e.query)) {
        const float metric = is_cost(rule) ? -e.merit : e.merit, iou = iou_[e.query];
        claim(t, {e.query, t, metric, iou, o_.by_metric ? e.merit : iou});
      }
    }
  }

  bool prior_is_inside(const AssignTarget& t, int64_t q) const {
    return is_inside(t, priors_.x[q], priors_.y[q], kInsideMargin);
  }

  int64_t dynamic_k(const AssignTarget& target, int32_t) {
    best_.start(std::min<int64_t>(o_.topk, count_));
    for (int64_t c = 0; c < chunks(); ++c) {
      if constexpr (rule == AssignRule::tal_any) {
        for_each_bit(in_box(target, c, kPointMargin), [&](int j) {
          const int64_t q = c * kChunk + j;
          const float u = pair_iou<rule>(target, boxes_.at(q));
          best_.offer(u > 0.0f ? u : minus_infinity<float>(), q);
        });
      } else {
        uint64_t bits = above_in(iou_, c, at_least(best_.floor(), 0.0f));
        if constexpr (is_cost(rule)) {
          bits &= admitted_[c];
        }
        for_each_bit(bits, [&](int j) { best_.offer(iou_[c * kChunk + j], c * kChunk + j); });
      }
    }
    float total = 0.0f;
    for (const BestQueries::Entry& e : best_) {
      total += e.merit;
    }
    return std::max<int64_t>(1, static_cast<int64_t>(total));
  }

  // Upper bounds of the metrics of n queries, where the exponent is one of the usual ones; otherwise the overlaps must
  // do, which tell only where the metric is 0.
  bool bound_metrics(int64_t first, int64_t n) {
    const auto fill = [&](auto exponent) {
      power_row<exponent()>(&iou_[first], &bound_[first], n);
      return true;
    };
    switch (o_.beta.whole) {
      case 1:
        return fill(std::integral_constant<int, 1>{});
      case 2:
        return fill(std::integral_constant<int, 2>{});
      case 3:
        return fill(std::integral_constant<int, 3>{});
      case 4:
        return fill(std::integral_constant<int, 4>{});
      case 6:
        return fill(std::integral_constant<int, 6>{});
      default:
        return false;
    }
  }

  void offer_aligned(const AssignTarget& target) {
    const bool bounded = bound_metrics(0, whole_vectors(count_));
    const std::vector<float>& row = bounded ? bound_ : iou_;
    for (int64_t c = 0; c < chunks(); c += kBlock) {
      const float floor = bounded ? at_least(best_.floor(), 0.0f) : 0.0f;
      int found = 0;
      int32_t query[kBlock * kChunk];
      float score[kBlock * kChunk];
      for (int64_t d = c; d < std::min(c + kBlock, chunks()); ++d) {
        for_each_bit(above_in(row, d, floor), [&](int j) {
          query[found] = static_cast<int32_t>(d * kChunk + j);
          score[found++] = view_.score(d * kChunk + j, target.label);
        });
      }
      for (int i = 0; i < found; ++i) {
        const float power_of_iou = bounded ? bound_[query[i]] : power(iou_[query[i]], o_.beta);
        const float m = power(probability(score[i], o_.from_logits), o_.alpha) * power_of_iou;
        if (m > 0.0f) {
          best_.offer(m, query[i]);
        }
      }
    }
  }

  void offer_inside(const AssignTarget& target) {
    for (int64_t c = 0; c < chunks(); ++c) {
      uint64_t bits = in_box(target, c, kPointMargin);
      if (!bits) {
        continue;
      }
      // The aspect term of CIoU costs an arc tangent and only lowers the IoU.
      const int64_t first = c * kChunk, n = std::min(kChunk, whole_vectors(count_ - first));
      overlap_row<Mode::iou, false>(target.box, boxes_.from(first), ciou_eps(), &iou_[first], n);
      const bool bounded = bound_metrics(first, n);
      bits &= above_in(bounded ? bound_ : iou_, c, bounded ? at_least(best_.floor(), 0.0f) : 0.0f);
      for_each_bit(bits, [&](int j) { offer_box(target, first + j); });
    }
  }

  // Offers a query whose IoU is known and replaced by the CIoU if it may matter.
  void offer_box(const AssignTarget& target, int64_t q) {
    const float s = power(probability(view_.score(q, target.label), o_.from_logits), o_.alpha);
    if (s * power(iou_[q], o_.beta) > best_.floor()) {
      iou_[q] = pair_iou<rule>(target, boxes_.at(q));
      const float m = s * power(iou_[q], o_.beta);
      best_.offer(m > 0.0f ? m : minus_infinity<float>(), q);
    }
  }

  void offer_cheapest(const AssignTarget& target, int32_t t) {
    const uint64_t* centered = &centered_[t * chunks()];
    if constexpr (rule == AssignRule::simota) {
      offer_costs(target, 0.0f, [&](int64_t c) { return centered[c]; });
      if (!best_.full() || -best_.floor() > kOffCenter - 1.0f) {
        offer_costs(target, kOffCenter, [&](int64_t c) { return admitted_[c] & ~centered[c]; });
      }
    } else {
      offer_costs(target, 0.0f, [&](int64_t c) { return admitted_[c]; });
    }
  }

  // Offers the queries of some bits, whose cost is at least `base`: those that overlap first, as they are likely to
  // rule out all others.
  template <typename Bits>
  void offer_costs(const AssignTarget& target, float base, Bits&& bits_of) {
    const auto overlapping = [&](int64_t c) { return above_in(iou_, c, 0.0f); };
    offer_some(target, base, [&](int64_t c, uint64_t bits) { return bits & overlapping(c); }, bits_of);
    if (least_overlap(-best_.floor() - base, o_.eps) < 0.0f) {
      offer_some(target, base, [&](int64_t c, uint64_t bits) { return bits & ~overlapping(c); }, bits_of);
    }
  }

  template <typename Filter, typename Bits>
  void offer_some(const AssignTarget& target, float base, Filter&& filter, Bits&& bits_of) {
    float floor = best_.floor(), least = least_overlap(-floor - base, o_.eps);
    for (int64_t c = 0; c < chunks(); ++c) {
      const uint64_t bits = bits_of(c);
      for_each_bit(bits ? filter(c, bits) : 0, [&](int j) {
        const int64_t q = c * kChunk + j;
        if (iou_[q] > least) {
          best_.offer(value(target, q, iou_[q]).merit, q);
        }
        if (best_.floor() != floor) {
          floor = best_.floor();
          least = least_overlap(-floor - base, o_.eps);
        }
      });
    }
  }

  void choose_standing_out(int32_t t) {
    const AssignTarget& target = targets_[t];
    nearest_.clear();
    nearness_row(center_x_.data(), center_y_.data(), target.cx, target.cy, bound_.data(), count_);
    int64_t begin = 0;
    for (int level = 0; level < o_.level_count; ++level) {
      const int64_t end = o_.level_end[level];
      add_nearest(begin, end);
      begin = end;
    }
    const double floor = mean_and_deviation();
    for (const int32_t q : nearest_) {
      if (static_cast<double>(iou_[q]) >= floor && is_inside(target, center_x_[q], center_y_[q], kInsideMargin)) {
        const float merit = merit_of_metric<rule>(iou_[q]);
        claim(t, {q, t, iou_[q], iou_[q], o_.by_metric ? merit : iou_[q]});
      }
    }
  }

  void add_nearest(int64_t begin, int64_t end) {
    best_.start(std::min<int64_t>(o_.topk, end - begin));
    for (int64_t first = begin; first < end; first += kChunk) {
      for_each_bit(above(&bound_[first], best_.floor()) & bits_before(0, end - first),
                   [&](int j) { best_.offer(bound_[first + j], first + j); });
    }
    for (const BestQueries::Entry& e : best_) {
      nearest_.push_back(e.query);
    }
  }

  // NaN, which nothing reaches, for fewer than two.
  double mean_and_deviation() const {
    const auto n = static_cast<double>(nearest_.size());
    double total = 0.0, squares = 0.0;
    for (const int32_t q : nearest_) {
      total += static_cast<double>(positive(iou_[q]));
    }
    const double mean = total / n;
    for (const int32_t q : nearest_) {
      const double off = static_cast<double>(positive(iou_[q])) - mean;
      squares += off * off;
    }
    return mean + std::sqrt(squares / (n - 1));
  }

  // Targets come in their order, so that the lowest keeps a tie.
  void claim(int32_t, const Owned& wish) {
    int32_t& owner = owner_[wish.query];
    if (owner < 0) {
      owner = static_cast<int32_t>(owned_.size());
      wanted_[wish.query] = 1;
      owned_.push_back(wish);
    } else {
      ++wanted_[wish.query];
      if (wish.contest > owned_[owner].contest) {
        owned_[owner] = wish;
      }
    }
  }

  // Gives queries that several targets want to the one of all targets that they suit best.
  void settle_contested() {
    for (Owned& own : owned_) {
      if (wanted_[own.query] > 1) {
        settle(own);
      }
    }
  }

  void settle(Owned& own) {
    const Box<float> box = boxes_.at(own.query);
    float least = floor_of(own);
    for (int32_t t = 0; t < static_cast<int32_t>(targets_.size()); ++t) {
      if (!usable_[t] || !may_serve(targets_[t], own)) {
        continue;
      }
      const float iou = pair_iou<rule>(targets_[t], box);
      if (!(iou > least)) {
        continue;
      }
      const PairValue v = value(targets_[t], own.query, iou);
      const float contest = contest_of(v, o_);
      if (v.merit > minus_infinity<float>() && (contest > own.contest || (contest == own.contest && t < own.target))) {
        own = {own.query, t, v.metric, v.iou, contest};
        least = floor_of(own);
      }
    }
  }

  // Overlap that a target needs to take a query from its owner; a bound from below.
  float floor_of(const Owned& own) const {
    return is_cost(rule) && o_.by_metric ? least_overlap(-own.contest, o_.eps) : -1.0f;
  }

  // Whether a target is worth a closer look.
  bool may_serve(const AssignTarget& t, const Owned& own) const {
    if constexpr (rule == AssignRule::tal_any) {
      return is_inside(t, priors_.x[own.query], priors_.y[own.query], kPointMargin);
    } else if constexpr (rule == AssignRule::simota) {
      const Prior p = load_prior(view_, own.query);
      const bool far_cheaper = o_.by_metric && -own.contest < kOffCenter - 1.0f;
      return !far_cheaper || (is_inside(t, p.x, p.y, 0.0f) && is_central(t, p));
    }
    return true;
  }

  // Keeps the best few queries of each target.
  void trim() {
    for (const Owned& own : owned_) {
      owner_[own.query] = -1;
    }
    std::sort(owned_.begin(), owned_.end(), [](const Owned& a, const Owned& b) {
      const float x = merit_of_metric<rule>(a.metric), y = merit_of_metric<rule>(b.metric);
      return a.target != b.target ? a.target < b.target : (x != y ? x > y : a.query < b.query);
    });
    size_t kept = 0;
    int32_t target = -1, rank = 0;
    for (const Owned& own : owned_) {
      rank = own.target == target ? rank + 1 : 0;
      target = own.target;
      if (rank < o_.final_topk && merit_of_metric<rule>(own.metric) > minus_infinity<float>()) {
        owned_[kept++] = own;
      }
    }
    owned_.resize(kept);
    for (size_t i = 0; i < kept; ++i) {
      owner_[owned_[i].query] = static_cast<int32_t>(i);
    }
  }

  struct Tally {
    int32_t count;
    float most_metric, most_iou;
  };

  void add_to_tally(const Owned& own) {
    Tally& tally = tallies_[own.target];
    ++tally.count;
    tally.most_metric = upper(own.metric, tally.most_metric);
    tally.most_iou = upper(own.iou, tally.most_iou);
  }

  void tally() {
    tallies_.assign(targets_.size(), {0, 0.0f, 0.0f});
    for (const Owned& own : owned_) {
      add_to_tally(own);
    }
  }

  // Targets without a query take their best one that is still background, one after another.
  void rescue() {
    for (int32_t t = 0; t < static_cast<int32_t>(targets_.size()); ++t) {
      if (tallies_[t].count > 0 || !usable_[t]) {
        continue;
      }
      Owned best{-1, t, 0.0f, 0.0f, minus_infinity<float>()};
      for (int64_t q = 0; q < count_; ++q) {
        if (owner_[q] >= 0 || !is_admitted(q)) {
          continue;
        }
        const PairValue v = value(targets_[t], q, pair_iou<rule>(targets_[t], boxes_.at(q)));
        if (v.merit > best.contest) {
          best = {static_cast<int32_t>(q), t, v.metric, v.iou, v.merit};
        }
      }
      if (best.query >= 0) {
        owner_[best.query] = static_cast<int32_t>(owned_.size());
        owned_.push_back(best);
        add_to_tally(best);
      }
    }
  }

  bool is_admitted(int64_t q) const {
    if constexpr (is_cost(rule)) {
      return admitted_[q / kChunk] >> (q % kChunk) & 1;
    }
    return true;
  }

  void write(int64_t layer, int64_t image) {
    const int64_t first = (layer * in_.rows.batch + image) * count_;
    std::fill(out_.target + first, out_.target + first + count_, -1);
    for (float* plane : {out_.metric, out_.iou, out_.weight}) {
      std::fill(plane + first, plane + first + count_, 0.0f);
    }
    for (const Owned& own : owned_) {
      const int64_t i = first + own.query;
      const Tally& tally = tallies_[own.target];
      out_.target[i] = rows_.begin + own.target;
      out_.metric[i] = own.metric;
      out_.iou[i] = own.iou;
      out_.weight[i] = weight_of<rule>(own.metric, own.iou, tally.most_metric, tally.most_iou, o_.eps);
      owner_[own.query] = -1;
    }
    for (size_t t = 0; t < targets_.size(); ++t) {
      out_.count[layer * in_.rows.rows + rows_.begin + static_cast<int64_t>(t)] = tallies_[t].count;
    }
  }

  const AssignInput& in_;
  const AssignOptions& o_;
  const PriorPlanes& priors_;
  AssignOutput out_;
  int64_t count_;  // Q

  QueryView view_{};
  RowRange rows_{};
  std::vector<AssignTarget> targets_;
  std::vector<uint8_t> usable_;
  PlaneBuffer<float> box_buffer_;
  Planes<float> boxes_;
  std::vector<float> iou_, bound_;  // [Q], of the target at hand
  BestQueries best_;
  std::vector<int32_t> nearest_;               // "atss"
  std::vector<float> center_x_, center_y_;     // "atss", [Q]
  std::vector<uint64_t> admitted_, centered_;  // costs: bits of [Q] and [T, Q]
  std::vector<float> background_, scores_;     // costs
  std::vector<uint8_t> known_;                 // whether background_ is computed
  std::vector<Owned> owned_;
  std::vector<int32_t> wanted_, owner_;  // [Q]: how many targets want a query, its place in owned_ or -1
  std::vector<Tally> tallies_;
};

}  // namespace ssod
