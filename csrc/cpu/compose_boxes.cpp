// compose_boxes on the CPU: the boxes of every canvas, one placement after the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "compose.h"

namespace ssod {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr float kAreaEps = 1e-7f;  // added to areas that divide, as in MixPL's erase filter
constexpr int64_t kPadLabel = -1;

struct Box {
  float x1, y1, x2, y2;  // xyxy, pixels

  bool finite() const { return std::isfinite(x1) && std::isfinite(y1) && std::isfinite(x2) && std::isfinite(y2); }
  float area() const { return std::max(x2 - x1, 0.0f) * std::max(y2 - y1, 0.0f); }

  Box clamped(const Box& r) const {
    return {std::clamp(x1, r.x1, r.x2), std::clamp(y1, r.y1, r.y2), std::clamp(x2, r.x1, r.x2),
            std::clamp(y2, r.y1, r.y2)};
  }
  Box intersected(const Box& r) const {
    return {std::max(x1, r.x1), std::max(y1, r.y1), std::min(x2, r.x2), std::min(y2, r.y2)};
  }
};

Box as_box(int32_t x0, int32_t y0, int32_t x1, int32_t y1) {
  return {static_cast<float>(x0), static_cast<float>(y0), static_cast<float>(x1), static_cast<float>(y1)};
}

struct Rule {
  float erase_thr, min_visibility;
  std::optional<float> min_wh;
  bool erase_union, propagate_weight, over;

  bool too_small(const Box& b) const { return min_wh && !(b.x2 - b.x1 > *min_wh && b.y2 - b.y1 > *min_wh); }
};

struct Sources {
  const Box* boxes;       // [S, P]
  const int64_t* labels;  // [S, P]
  const float *scores, *weights;
  const int32_t* count;  // [S]
  int64_t num, per_source;
};

// CanvasRows of one canvas.
struct CanvasRows {
  Box* boxes;
  int64_t* labels;
  float *scores, *weights;
  int32_t *placement, *index;
  int64_t nmax, count = 0, overflow = 0;

  void push(const Box& box, int64_t label, float score, float weight, int32_t k, int32_t p) {
    if (count == nmax) {
      ++overflow;
      return;
    }
    boxes[count] = box;
    labels[count] = label;
    scores[count] = score;
    weights[count] = weight;
    placement[count] = k;
    index[count] = p;
    ++count;
  }

  void pad() {
    for (int64_t i = count; i < nmax; ++i) {
      boxes[i] = {};
      labels[i] = kPadLabel;
      scores[i] = weights[i] = 0.0f;
      placement[i] = index[i] = 0;
    }
  }
};

float sum_area(const Box& box, const std::vector<Box>& patches) {
  float total = 0.0f;
  for (const Box& patch : patches) total += box.intersected(patch).area();
  return total;
}

// Length of the union of intervals.
float union_length(std::vector<std::pair<float, float>>& intervals) {
  std::sort(intervals.begin(), intervals.end());
  float total = 0.0f, reached = -INFINITY;
  for (const auto& [low, high] : intervals) {
    if (high <= reached) continue;
    total += high - std::max(low, reached);
    reached = high;
  }
  return total;
}

// Area of the box under any patch: vertical slabs between the patches' edges.
float union_area(const Box& box, const std::vector<Box>& patches) {
  std::vector<float> edges;
  std::vector<Box> cuts;
  for (const Box& patch : patches) {
    const Box cut = box.intersected(patch);
    if (cut.area() <= 0.0f) continue;
    cuts.push_back(cut);
    edges.push_back(cut.x1);
    edges.push_back(cut.x2);
  }
  std::sort(edges.begin(), edges.end());
  float total = 0.0f;
  std::vector<std::pair<float, float>> intervals;
  for (size_t i = 0; i + 1 < edges.size(); ++i) {
    if (edges[i] == edges[i + 1]) continue;
    intervals.clear();
    for (const Box& cut : cuts) {
      if (cut.x1 <= edges[i] && edges[i + 1] <= cut.x2) intervals.emplace_back(cut.y1, cut.y2);
    }
    total += (edges[i + 1] - edges[i]) * union_length(intervals);
  }
  return total;
}

// Scaled to the resized source, clamped to it, and flipped.
Box resize_and_flip(const Box& box, const Place& place, const Scales& scales) {
  const Box frame = as_box(0, 0, place.out_w, place.out_h);
  Box b = Box{box.x1 * scales.box_sx, box.y1 * scales.box_sy, box.x2 * scales.box_sx, box.y2 * scales.box_sy}.clamped(
      frame);
  if (place.flip_x()) std::tie(b.x1, b.x2) = std::make_pair(frame.x2 - b.x2, frame.x2 - b.x1);
  if (place.flip_y()) std::tie(b.y1, b.y2) = std::make_pair(frame.y2 - b.y2, frame.y2 - b.y1);
  return b;
}

// The boxes of one canvas: its K placements, their scales and their E patches each.
class CanvasBoxes {
 public:
  CanvasBoxes(const Sources& sources, const Rule& rule, const Place* places, const Scales* scales, const Rect* erase,
              int64_t num_places, int64_t num_erase)
      : sources_(sources),
        rule_(rule),
        places_(places),
        scales_(scales),
        erase_(erase),
        num_places_(num_places),
        num_erase_(num_erase) {}

  void collect(CanvasRows& rows) {
    for (int64_t k = 0; k < num_places_; ++k) {
      if (places_[k].used()) collect_placement(rows, k);
    }
    rows.pad();
  }

 private:
  void collect_placement(CanvasRows& rows, int64_t k) {
    const Place& place = places_[k];
    find_patches(k);
    const int64_t num_boxes = std::min<int64_t>(sources_.count[place.src], sources_.per_source);
    for (int64_t p = 0; p < num_boxes; ++p) {
      const int64_t i = place.src * sources_.per_source + p;
      if (sources_.labels[i] < 0 || !sources_.boxes[i].finite()) continue;
      const std::optional<Box> box = moved(sources_.boxes[i], k);
      if (!box) continue;
      const float weight = sources_.weights[i] * (rule_.propagate_weight ? scales_[k].weight : 1.0f);
      rows.push(*box, sources_.labels[i], sources_.scores[i], weight, static_cast<int32_t>(k), static_cast<int32_t>(p));
    }
  }

  // The box on the canvas, or nothing if it is dropped.
  std::optional<Box> moved(const Box& source, int64_t k) const {
    const Place& place = places_[k];
    const Box local = resize_and_flip(source, place, scales_[k]);
    const float erased = rule_.erase_union ? union_area(local, patches_) : sum_area(local, patches_);
    if (erased / (local.area() + kAreaEps) >= rule_.erase_thr) return std::nullopt;
    const float dx = static_cast<float>(place.off_x), dy = static_cast<float>(place.off_y);
    const Box shifted{local.x1 + dx, local.y1 + dy, local.x2 + dx, local.y2 + dy};
    const Box clipped = shifted.clamped(as_box(place.x0, place.y0, place.x1, place.y1));
    const float visible = std::max(clipped.area() - hidden_area(clipped, k), 0.0f);
    if (visible / (shifted.area() + kAreaEps) < rule_.min_visibility || rule_.too_small(clipped)) return std::nullopt;
    return clipped;
  }

  // What later placements paint over.
  float hidden_area(const Box& box, int64_t k) const {
    float total = 0.0f;
    for (int64_t later = k + 1; rule_.over && later < num_places_; ++later) {
      const Place& p = places_[later];
      if (p.used()) total += box.intersected(as_box(p.x0, p.y0, p.x1, p.y1)).area();
    }
    return total;
  }

  void find_patches(int64_t k) {
    patches_.clear();
    for (int32_t e = 0; e < places_[k].n_erase; ++e) {
      const Rect& r = erase_[k * num_erase_ + e];
      patches_.push_back(as_box(r.x0, r.y0, r.x1, r.y1));
    }
  }

  const Sources& sources_;
  const Rule& rule_;
  const Place* places_;
  const Scales* scales_;
  const Rect* erase_;
  const int64_t num_places_, num_erase_;
  std::vector<Box> patches_;  // of the placement at hand, in its frame
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs compose_boxes(Tensor boxes, Tensor labels, Tensor scores, Tensor weights, Tensor count, Tensor place_i,
                      Tensor place_f, Tensor erase, int64_t nmax, double erase_thr, bool erase_union,
                      double min_visibility, std::optional<double> min_wh, bool propagate_weight, bool over) {
  for (Tensor* t : {&boxes, &labels, &scores, &weights, &count, &place_i, &place_f, &erase}) {
    *t = torch::stable::contiguous(*t);
  }
  const int64_t batch = place_i.size(0), num_places = place_i.size(1), num_erase = erase.size(2);
  const auto make = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(boxes, shape, dtype);
  };
  Tensor out_boxes = make({batch, nmax, 4}, ScalarType::Float), out_labels = make({batch, nmax}, ScalarType::Long);
  Tensor out_scores = make({batch, nmax}, ScalarType::Float), out_weights = make({batch, nmax}, ScalarType::Float);
  Tensor placement = make({batch, nmax}, ScalarType::Int), index = make({batch, nmax}, ScalarType::Int);
  Tensor out_count = make({batch}, ScalarType::Int), overflow = make({batch}, ScalarType::Int);

  const Sources sources{static_cast<const Box*>(boxes.const_data_ptr()),
                        labels.const_data_ptr<int64_t>(),
                        scores.const_data_ptr<float>(),
                        weights.const_data_ptr<float>(),
                        count.const_data_ptr<int32_t>(),
                        boxes.size(0),
                        boxes.size(1)};
  const Rule rule{static_cast<float>(erase_thr),
                  static_cast<float>(min_visibility),
                  min_wh ? std::optional<float>(static_cast<float>(*min_wh)) : std::nullopt,
                  erase_union,
                  propagate_weight,
                  over};
  const auto* places = static_cast<const Place*>(place_i.const_data_ptr());
  const auto* scales = static_cast<const Scales*>(place_f.const_data_ptr());
  const auto* patches = static_cast<const Rect*>(erase.const_data_ptr());
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b * nmax, k = b * num_places;
      CanvasRows rows{static_cast<Box*>(out_boxes.mutable_data_ptr()) + row,
                      out_labels.mutable_data_ptr<int64_t>() + row,
                      out_scores.mutable_data_ptr<float>() + row,
                      out_weights.mutable_data_ptr<float>() + row,
                      placement.mutable_data_ptr<int32_t>() + row,
                      index.mutable_data_ptr<int32_t>() + row,
                      nmax};
      CanvasBoxes(sources, rule, places + k, scales + k, patches + k * num_erase, num_places, num_erase).collect(rows);
      out_count.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(rows.count);
      overflow.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(rows.overflow);
    }
  });
  return {out_boxes, out_labels, out_scores, out_weights, placement, index, out_count, overflow};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("compose_boxes", TORCH_BOX(&compose_boxes)); }

}  // namespace ssod
