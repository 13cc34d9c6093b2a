// What a pair of a query and a target is worth in one-to-many assignment, shared by the CPU and CUDA kernels.
// ssod_fast/ops/_one_to_many.py is the specification; sums, products and roots follow its order of operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "boxes.h"
#include "exp_log.h"

namespace ssod {

enum class AssignRule : int64_t { tal, tal_any, simota, soft_label, atss };

SSOD_HD constexpr bool is_cost(AssignRule rule) { return rule == AssignRule::simota || rule == AssignRule::soft_label; }
SSOD_HD constexpr bool is_aligned(AssignRule rule) { return rule == AssignRule::tal || rule == AssignRule::tal_any; }

constexpr int kMaxLevels = 16;
constexpr float kInsideMargin = 0.01f;  // pixels: how far a centre must be inside for "tal" with priors and "atss"
constexpr float kPointMargin = 1e-9f;   // the same for "tal_any"
constexpr float kCenterRadius = 2.5f;   // strides: the central region of "simota"
constexpr float kIouWeight = 3.0f;      // of -ln(IoU) in the costs
constexpr float kOffCenter = 1e5f;      // what "simota" adds outside of box and central region
constexpr float kSoftCenter = 3.0f;     // strides at which the centre cost of "soft_label" reaches 1
constexpr float kTooFar = 42.0f;        // strides beyond which that cost is infinite
constexpr float kMinLog = -100.0f;      // logarithms of probabilities are raised to it

// An exponent of the metric. Whole ones are raised by squaring and 1/2 is a root, so that all implementations round
// alike.
struct Exponent {
  float value;
  int whole;  // -1: not a small whole number
  bool root;
};

inline Exponent make_exponent(double value) {
  const bool whole = value <= 64 && value == std::floor(value);
  return {static_cast<float>(value), whole ? static_cast<int>(value) : -1, value == 0.5};
}

SSOD_HD float at_least(float x, float floor) { return x < floor ? floor : x; }

SSOD_HD float whole_power(float x, int exponent) {
  float result = 1.0f;
  for (; exponent; exponent >>= 1, x *= x) {
    result = exponent & 1 ? result * x : result;
  }
  return result;
}

SSOD_HD float power(float x, const Exponent& e) {
  if (e.root) {
    return std::sqrt(x);
  }
  return e.whole < 0 ? std::pow(x, e.value) : whole_power(x, e.whole);
}

// Options of a call; a plain value, passed to kernels as it is.
struct AssignOptions {
  AssignRule rule;
  Format format;
  Exponent alpha, beta;
  float eps, min_side;
  int topk, final_topk;
  int level_count;
  int64_t level_end[kMaxLevels];
  bool from_logits, dynamic_k, by_metric, any_target, keep_one;
};

// The queries of one image on one layer.
struct QueryView {
  const float* scores;  // [Q, C], or null
  int64_t score_stride, class_stride, classes;
  const float* boxes;  // [Q, 4]
  int64_t box_stride;
  float scale_x, scale_y;  // of the boxes
  const float* priors;     // [Q, prior_width], or null
  int64_t prior_width;
  int64_t count;  // Q

  SSOD_HD float score(int64_t q, int64_t label) const { return scores[q * score_stride + label * class_stride]; }

  SSOD_HD Box<float> box(int64_t q, Format format) const {
    const float* v = boxes + q * box_stride;
    return make_box(v[0] * scale_x, v[1] * scale_y, v[2] * scale_x, v[3] * scale_y, format, false);
  }
};

// A prior: its centre, and the strides of its level where they are known.
struct Prior {
  float x, y, stride_x, stride_y;
};

SSOD_HD Prior load_prior(const QueryView& queries, int64_t q) {
  const float* v = queries.priors + q * queries.prior_width;
  const bool strides = queries.prior_width > 2;
  return {v[0], v[1], strides ? v[2] : 1.0f, strides ? v[3] : 1.0f};
}

// Centre of the prior, or of the box where there is none. The corners of a box that is not finite are 0 and its area is
// NaN, which its centre must show.
SSOD_HD Prior center_of(const QueryView& queries, int64_t q, const Box<float>& box) {
  if (queries.priors) {
    return load_prior(queries, q);
  }
  const float nan_or_zero = box.area - box.area;
  return {(box.x1 + box.x2) / 2.0f + nan_or_zero, (box.y1 + box.y2) / 2.0f + nan_or_zero, 1.0f, 1.0f};
}

struct AssignTarget {
  Box<float> box;
  float x1, y1, x2, y2;  // where priors must be: the box as it is given, enlarged for "tal_any"
  float cx, cy;
  int64_t label;
};

SSOD_HD void enlarge(float& low, float& high, float center, float side) {
  const bool small = high - low < side;
  low = small ? center - side / 2.0f : low;
  high = small ? center + side / 2.0f : high;
}

SSOD_HD AssignTarget make_assign_target(const float* box, int64_t label, const AssignOptions& o) {
  AssignTarget t;
  t.box = make_box(box[0], box[1], box[2], box[3], Format::xyxy, false);
  t.x1 = box[0], t.y1 = box[1], t.x2 = box[2], t.y2 = box[3];
  t.cx = (t.x1 + t.x2) / 2.0f;
  t.cy = (t.y1 + t.y2) / 2.0f;
  t.label = label;
  if (o.rule == AssignRule::tal_any) {
    t.box.angle = box_angle(t.box, false);
    enlarge(t.x1, t.x2, t.cx, o.min_side);
    enlarge(t.y1, t.y2, t.cy, o.min_side);
  }
  return t;
}

// Whether a target can take queries: its label must name a class.
SSOD_HD bool has_class(const AssignOptions& o, int64_t label, int64_t classes) {
  return o.rule == AssignRule::atss || (label >= 0 && label < classes);
}

SSOD_HD bool is_inside(const AssignTarget& t, float x, float y, float margin) {
  return x - t.x1 > margin && y - t.y1 > margin && t.x2 - x > margin && t.y2 - y > margin;
}

// Whether a prior lies in the central region of "simota".
SSOD_HD bool is_central(const AssignTarget& t, const Prior& p) {
  const float dx = p.x - t.cx, dy = p.y - t.cy;
  const float rx = kCenterRadius * p.stride_x, ry = kCenterRadius * p.stride_y;
  return rx + dx > 0.0f && ry + dy > 0.0f && rx - dx > 0.0f && ry - dy > 0.0f;
}

// Whether a prior takes part in the costs because of this target.
template <AssignRule rule>
SSOD_HD bool admits(const AssignTarget& t, const Prior& p) {
  return is_inside(t, p.x, p.y, 0.0f) || (rule == AssignRule::simota && is_central(t, p));
}

// The guards of IoU (the union is raised to 1e-6) and of CIoU (1e-7 is added to the denominators).
SSOD_HD Eps<float> iou_eps() { return {1e-6f, 0.0f, 0.0f}; }
SSOD_HD Eps<float> ciou_eps() { return {minus_infinity<float>(), 1e-7f, 1e-7f}; }

// Overlap of a pair, at least 0. NaN stays: such a pair is impossible.
template <AssignRule rule>
SSOD_HD float pair_iou(const AssignTarget& t, Box<float> query) {
  if constexpr (rule == AssignRule::tal_any) {
    query.angle = box_angle(query, false);
    return at_least(overlap<Mode::ciou, false>(t.box, query, ciou_eps()), 0.0f);
  } else {
    return overlap<Mode::iou, false>(t.box, query, iou_eps());
  }
}

SSOD_HD float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Probability in 0..1, or NaN.
SSOD_HD float probability(float x, bool from_logits) {
  if (from_logits) {
    return sigmoid(x);
  }
  return x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x);
}

// ln(1 + e^x).
SSOD_HD float softplus(float x) {
  const float result = positive(x) + fast_log(1.0f + fast_exp(x < 0.0f ? x : -x));
  return x == x ? result : x;
}

// ln(1 - p) and ln p of a score.
SSOD_HD float log_miss(float x, bool from_logits) {
  return at_least(from_logits ? -softplus(x) : std::log1p(-probability(x, false)), kMinLog);
}

SSOD_HD float log_hit(float x, bool from_logits) {
  return at_least(from_logits ? -softplus(-x) : std::log(probability(x, false)), kMinLog);
}

// A class's share of the cost of "soft_label" where it is not the label.
SSOD_HD float soft_background(float x) {
  const float e = fast_exp(x < 0.0f ? x : -x), s = (x < 0.0f ? e : 1.0f) / (1.0f + e);
  return softplus(x) * (s * s);
}

// A class's share of the part of the cost that all targets have in common.
template <AssignRule rule>
SSOD_HD float class_background(float x, bool from_logits) {
  return rule == AssignRule::simota ? log_miss(x, from_logits) : soft_background(x);
}

// Marks a prior that takes part for no target; no sum of class_background is as low.
SSOD_HD float no_background() { return minus_infinity<float>(); }

struct PairValue {
  float iou;
  float metric;  // what the rule reports: m, the cost, or the overlap
  float merit;   // what it maximises: the metric or minus the cost; -inf where the pair is impossible
};

SSOD_HD float simota_cost(float x, float background, float iou, bool centered, const AssignOptions& o) {
  const float classes = -((background - log_miss(x, o.from_logits)) + log_hit(x, o.from_logits));
  return (classes + kIouWeight * -std::log(iou + o.eps)) + (centered ? 0.0f : kOffCenter);
}

SSOD_HD float soft_label_cost(float x, float background, float iou, float distance, const AssignOptions& o) {
  const float miss = iou - sigmoid(x);
  const float own = (softplus(x) - x * iou) * (miss * miss);
  const float classes = (background - soft_background(x)) + own;
  return (classes + kIouWeight * -std::log(iou + o.eps)) + std::pow(10.0f, distance - kSoftCenter);
}

SSOD_HD float stride_distance(const AssignTarget& t, const Prior& p) {
  const float dx = p.x - t.cx, dy = p.y - t.cy;
  return std::sqrt(dx * dx + dy * dy) / p.stride_x;
}

// Value of a pair whose overlap is known. `background`: of the query, read by the costs only.
template <AssignRule rule>
SSOD_HD PairValue value_of(const QueryView& queries, const AssignTarget& t, int64_t q, float iou, float background,
                           const AssignOptions& o) {
  if constexpr (rule == AssignRule::atss) {
    return {iou, iou, iou > 0.0f ? iou : minus_infinity<float>()};
  } else if constexpr (is_aligned(rule)) {
    const float m = power(probability(queries.score(q, t.label), o.from_logits), o.alpha) * power(iou, o.beta);
    bool possible = iou > 0.0f && m >= 0.0f;
    if constexpr (rule == AssignRule::tal_any) {
      const Prior p = load_prior(queries, q);
      possible = possible && is_inside(t, p.x, p.y, kPointMargin);
    }
    return {iou, m, possible ? m : minus_infinity<float>()};
  } else {
    const Prior p = load_prior(queries, q);
    if constexpr (rule == AssignRule::soft_label) {
      if (stride_distance(t, p) > kTooFar) {
        return {iou, static_cast<float>(INFINITY), minus_infinity<float>()};
      }
    }
    const float x = queries.score(q, t.label);
    float cost;
    if constexpr (rule == AssignRule::simota) {
      cost = simota_cost(x, background, iou, is_inside(t, p.x, p.y, 0.0f) && is_central(t, p), o);
    } else {
      cost = soft_label_cost(x, background, iou, stride_distance(t, p), o);
    }
    const float size = cost < 0.0f ? -cost : cost;
    const bool possible = background != no_background() && size < static_cast<float>(INFINITY);
    return {iou, cost, possible ? -cost : minus_infinity<float>()};
  }
}

template <AssignRule rule>
SSOD_HD PairValue value_of(const QueryView& queries, const AssignTarget& t, int64_t q, float background,
                           const AssignOptions& o) {
  return value_of<rule>(queries, t, q, pair_iou<rule>(t, queries.box(q, o.format)), background, o);
}

// What decides between targets that want one query.
SSOD_HD float contest_of(const PairValue& v, const AssignOptions& o) { return o.by_metric ? v.merit : v.iou; }

// Merit of a pair that is taken, from its metric.
template <AssignRule rule>
SSOD_HD float merit_of_metric(float metric) {
  if constexpr (is_cost(rule)) {
    return -metric;
  }
  return rule == AssignRule::atss && !(metric > 0.0f) ? minus_infinity<float>() : metric;
}

// Weight of a pair, from the largest metric and overlap among the queries of its target.
template <AssignRule rule>
SSOD_HD float weight_of(float metric, float iou, float most_metric, float most_iou, float eps) {
  if constexpr (is_aligned(rule)) {
    return metric / (most_metric + eps) * most_iou;
  }
  return iou;
}

// Calls f with the rule as a compile-time constant.
template <typename F>
void with_assign_rule(AssignRule rule, F&& f) {
  switch (rule) {
    case AssignRule::tal:
      return f(std::integral_constant<AssignRule, AssignRule::tal>{});
    case AssignRule::tal_any:
      return f(std::integral_constant<AssignRule, AssignRule::tal_any>{});
    case AssignRule::simota:
      return f(std::integral_constant<AssignRule, AssignRule::simota>{});
    case AssignRule::soft_label:
      return f(std::integral_constant<AssignRule, AssignRule::soft_label>{});
    case AssignRule::atss:
      return f(std::integral_constant<AssignRule, AssignRule::atss>{});
  }
}

}  // namespace ssod
