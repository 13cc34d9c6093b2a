// Which queries each target of an image wants.
//
// Overlaps are computed for whole rows of queries; scores, logarithms and aspect terms only for queries that may still
// be among the best of a target.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/assign_rows.h"
#include "cpu/best_queries.h"
#include "cpu/box_planes.h"
#include "cpu/class_background.h"
#include "one_to_many_team.h"

namespace ssod {

constexpr int64_t kBlock = 4;  // chunks whose scores are fetched together

template <AssignRule rule>
class QueryChooser {
 public:
  QueryChooser(const AssignInput& in, const PriorPlanes& priors)
      : in_(in),
        o_(in.options),
        priors_(priors),
        count_(in.queries),
        box_buffer_(in.queries),
        boxes_(box_buffer_.planes()),
        iou_(in.queries + kChunk),
        bound_(in.queries + kChunk) {
    if constexpr (is_cost(rule)) {
      background_.resize(count_);
      known_.resize(count_);
    }
  }

  int32_t targets() const { return static_cast<int32_t>(targets_.size()); }
  const AssignTarget& target(int32_t t) const { return targets_[t]; }
  bool usable(int32_t t) const { return usable_[t]; }
  int64_t first_row() const { return rows_.begin; }

  // Reads an image on a layer.
  void load(int64_t layer, int64_t image) {
    view_ = in_.view(layer, image);
    rows_ = in_.rows.of(image);
    targets_.resize(rows_.size);
    usable_.resize(rows_.size);
    for (int64_t t = 0; t < rows_.size; ++t) {
      targets_[t] = in_.target(rows_.begin + t);
      usable_[t] = in_.usable(rows_.begin + t);
    }
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

  // Calls wish(q, value) for each query that target t wants.
  template <typename Wish>
  void choose(int32_t t, Wish&& wish) {
    const AssignTarget& target = targets_[t];
    if constexpr (rule == AssignRule::atss) {
      overlaps_of(target);
      choose_standing_out(target, wish);
      return;
    }
    if constexpr (rule != AssignRule::tal_any) {
      overlaps_of(target);
    }
    best_.start(std::min<int64_t>(o_.dynamic_k ? dynamic_k(target) : o_.topk, count_));
    if constexpr (rule == AssignRule::tal) {
      offer_aligned(target);
    } else if constexpr (rule == AssignRule::tal_any) {
      offer_inside(target);
    } else {
      offer_cheapest(target, t);
    }
    for (const BestQueries::Entry& e : best_) {
      if (rule != AssignRule::tal || !view_.priors || prior_is_inside(target, e.query)) {
        wish(e.query, PairValue{iou_[e.query], is_cost(rule) ? -e.merit : e.merit, e.merit});
      }
    }
  }

  // Value of a pair whose overlap is known.
  PairValue value(const AssignTarget& t, int64_t q, float iou) {
    return value_of<rule>(view_, t, q, iou, background(q), o_);
  }

  float iou(const AssignTarget& t, int64_t q) const { return pair_iou<rule>(t, boxes_.at(q)); }

  // Whether a target is worth a closer look, if it must beat this contest to take a query.
  bool may_serve(const AssignTarget& t, int64_t q, float contest) const {
    if constexpr (rule == AssignRule::tal_any) {
      return is_inside(t, priors_.x[q], priors_.y[q], kPointMargin);
    } else if constexpr (rule == AssignRule::simota) {
      const Prior p = load_prior(view_, q);
      const bool far_cheaper = o_.by_metric && -contest < kOffCenter - 1.0f;
      return !far_cheaper || (is_inside(t, p.x, p.y, 0.0f) && is_central(t, p));
    }
    return true;
  }

  // Whether any target admits the query.
  bool is_admitted(int64_t q) const {
    if constexpr (is_cost(rule)) {
      return admitted_[q / kChunk] >> (q % kChunk) & 1;
    }
    return true;
  }

 private:
  int64_t chunks() const { return (count_ + kChunk - 1) / kChunk; }

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

  void overlaps_of(const AssignTarget& t) {
    overlap_row<Mode::iou, false>(t.box, boxes_, iou_eps(), iou_.data(), whole_vectors(count_));
  }

  bool prior_is_inside(const AssignTarget& t, int64_t q) const {
    return is_inside(t, priors_.x[q], priors_.y[q], kInsideMargin);
  }

  int64_t dynamic_k(const AssignTarget& target) {
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

  template <typename Wish>
  void choose_standing_out(const AssignTarget& target, Wish&& wish) {
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
        wish(q, PairValue{iou_[q], iou_[q], merit_of_metric<rule>(iou_[q])});
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

  const AssignInput& in_;
  const AssignOptions& o_;
  const PriorPlanes& priors_;
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
};

}  // namespace ssod
