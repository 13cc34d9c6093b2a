// One-to-many assignment of one image on one layer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/query_chooser.h"

namespace ssod {

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

template <AssignRule rule>
class ImageAssigner {
 public:
  ImageAssigner(const AssignInput& in, const PriorPlanes& priors, const AssignOutput& out)
      : in_(in), o_(in.options), out_(out), chooser_(in, priors), wanted_(in.queries), owner_(in.queries, -1) {}

  // Fills the rows of the outputs that belong to the image; `count` is 0 before.
  void run(int64_t layer, int64_t image) {
    chooser_.load(layer, image);
    owned_.clear();
    for (int32_t t = 0; t < chooser_.targets(); ++t) {
      if (chooser_.usable(t)) {
        chooser_.choose(t, [&](int32_t q, const PairValue& v) { claim({q, t, v.metric, v.iou, contest_of(v, o_)}); });
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
  // Targets come in their order, so that the lowest keeps a tie.
  void claim(const Owned& wish) {
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
    float least = floor_of(own);
    for (int32_t t = 0; t < chooser_.targets(); ++t) {
      const AssignTarget& target = chooser_.target(t);
      if (!chooser_.usable(t) || !chooser_.may_serve(target, own.query, own.contest)) {
        continue;
      }
      const float iou = chooser_.iou(target, own.query);
      if (!(iou > least)) {
        continue;
      }
      const PairValue v = chooser_.value(target, own.query, iou);
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
    tallies_.assign(chooser_.targets(), {0, 0.0f, 0.0f});
    for (const Owned& own : owned_) {
      add_to_tally(own);
    }
  }

  // Targets without a query take their best one that is still background, one after another.
  void rescue() {
    for (int32_t t = 0; t < chooser_.targets(); ++t) {
      if (tallies_[t].count > 0 || !chooser_.usable(t)) {
        continue;
      }
      const AssignTarget& target = chooser_.target(t);
      Owned best{-1, t, 0.0f, 0.0f, minus_infinity<float>()};
      for (int64_t q = 0; q < in_.queries; ++q) {
        if (owner_[q] >= 0 || !chooser_.is_admitted(q)) {
          continue;
        }
        const PairValue v = chooser_.value(target, q, chooser_.iou(target, q));
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

  void write(int64_t layer, int64_t image) {
    const int64_t first = (layer * in_.rows.batch + image) * in_.queries;
    std::fill(out_.target + first, out_.target + first + in_.queries, -1);
    for (float* plane : {out_.metric, out_.iou, out_.weight}) {
      std::fill(plane + first, plane + first + in_.queries, 0.0f);
    }
    for (const Owned& own : owned_) {
      const int64_t i = first + own.query;
      const Tally& tally = tallies_[own.target];
      out_.target[i] = chooser_.first_row() + own.target;
      out_.metric[i] = own.metric;
      out_.iou[i] = own.iou;
      out_.weight[i] = weight_of<rule>(own.metric, own.iou, tally.most_metric, tally.most_iou, o_.eps);
      owner_[own.query] = -1;
    }
    for (int32_t t = 0; t < chooser_.targets(); ++t) {
      out_.count[layer * in_.rows.rows + chooser_.first_row() + t] = tallies_[t].count;
    }
  }

  const AssignInput& in_;
  const AssignOptions& o_;
  AssignOutput out_;
  QueryChooser<rule> chooser_;
  std::vector<Owned> owned_;
  std::vector<int32_t> wanted_, owner_;  // [Q]: how many targets want a query, its place in owned_ or -1
  std::vector<Tally> tallies_;
};

}  // namespace ssod
