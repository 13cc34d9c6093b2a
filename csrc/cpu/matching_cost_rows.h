// The matching cost of one problem: the targets of one image against the queries of one layer, a row per target.
//
// Queries are read once, as planes. The class term is computed once per distinct label, so that targets of one class
// share it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/box_planes.h"
#include "cpu/row_minimum.h"
#include "cpu/simd.h"
#include "matching_cost.h"
#include "predictions.h"

namespace ssod {

// What all problems of a call share. It points into the tensors, which must outlive it.
template <typename T>
struct CostCall {
  CostRule<T> rule;
  PredictionView logits, boxes;
  const int64_t* labels;  // [G]
  const T* target_boxes;  // [G, 4]
  const T* image_hw;      // [B, 2] or null
  const T* extra;         // [L, G, Q] or null
  int64_t extra_layer, extra_row;
};

// One problem: rows [row0, row0 + rows) of an image against queries [query0, query0 + queries) of a layer.
struct CostSlice {
  int64_t layer, image;
  int64_t row0, rows;
  int64_t query0, queries;
};

// Memory that grows as needed and is never cleared.
template <typename T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > capacity_) {
      capacity_ = std::max(count, 2 * capacity_);
      values_.reset(new (std::align_val_t{64}) T[capacity_]());
    }
    return values_.get();
  }

 private:
  struct Release {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  int64_t capacity_ = 0;
  std::unique_ptr<T[], Release> values_;
};

// Queries are taken in chunks, so that what is kept of them stays in the caches.
constexpr int64_t kQueryChunk = 1024;

template <typename T>
struct QueryPlanes {
  Planes<T> box;
  const T *a, *b, *c, *d;  // numbers of the L1 term

  SSOD_HD L1Box<T> l1(int64_t i) const { return {a[i], b[i], c[i], d[i]}; }
};

template <typename T>
struct CostTarget {
  Box<T> box;
  L1Box<T> l1;
  int32_t slot;  // of its label among the distinct ones, -1 for a label out of range
};

// What a thread needs for any number of problems, one after the other.
template <typename T>
struct CostWorkspace {
  Scratch<T> classes;  // [distinct labels, kQueryChunk]
  Scratch<int32_t> slot_of_class;
  std::vector<CostTarget<T>> targets;
  std::vector<int64_t> distinct;
  std::vector<T> least;  // smallest cost of each row so far
  alignas(64) T planes[9][kQueryChunk] = {};
  alignas(64) T row[kQueryChunk];
  alignas(64) T gathered[4 * kQueryChunk];
  alignas(64) T softmax[2][kQueryChunk];  // maximum and sum of each query

  // No overlap here wants an angle; its plane is that of the areas, because Planes::at reads all of them.
  QueryPlanes<T> query_planes() {
    return {
        {planes[0], planes[1], planes[2], planes[3], planes[4], planes[4]}, planes[5], planes[6], planes[7], planes[8]};
  }
};

namespace cost_rows {

// [n, 4] divided by (w, h, w, h), as planes. Dividing by 1 changes nothing.
template <typename T>
SSOD_CLONES static void unpack_l1(const T* __restrict boxes, int64_t n, T w, T h, T* __restrict a, T* __restrict b,
                                  T* __restrict c, T* __restrict d) {
  for (int64_t i = 0; i < n; ++i) {
    a[i] = boxes[4 * i] / w;
    b[i] = boxes[4 * i + 1] / h;
    c[i] = boxes[4 * i + 2] / w;
    d[i] = boxes[4 * i + 3] / h;
  }
}

template <typename X, typename T>
static void gather_column(const X* __restrict x, int64_t stride, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(x[i * stride]);
  }
}

// Columns `labels` of logits x [n, C] as rows of `out`. A few queries at a time: their logits stay in L1.
template <typename X, typename T>
void gather_columns(const X* x, int64_t stride, int64_t n, const std::vector<int64_t>& labels, T* out) {
  constexpr int64_t kQueries = 16;  // a cache line of each row of `out`
  for (int64_t q = 0; q < n; q += kQueries) {
    for (size_t u = 0; u < labels.size(); ++u) {
      gather_column(x + q * stride + labels[u], stride, std::min(kQueries, n - q),
                    out + static_cast<int64_t>(u) * kQueryChunk + q);
    }
  }
}

template <ClassMode mode, bool square, typename T>
SSOD_CLONES static void focal_row(T* __restrict x, const CostRule<T> rule, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = rule.w_class * focal_cost<mode, square>(x[i], rule);
  }
}

template <typename T>
SSOD_CLONES static void softmax_row(T* __restrict x, const T* __restrict maximum, const T* __restrict sum, T w_class,
                                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = w_class * softmax_cost(x[i], maximum[i], sum[i]);
  }
}

template <typename T>
SSOD_CLONES static void prob_row(T* __restrict x, T w_class, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = w_class * -x[i];
  }
}

// Folds 2 * kHalf lanes into the first one.
template <int kHalf, typename T, typename Op>
SSOD_HD T fold(T* lane, Op op) {
  for (int k = 0; k < kHalf; ++k) {
    lane[k] = op(lane[k], lane[k + kHalf]);
  }
  if constexpr (kHalf > 1) {
    return fold<kHalf / 2>(lane, op);
  }
  return lane[0];
}

// Maximum of each row of logits [n, classes], and the sum of exp(x - maximum), in lanes so that both vectorise.
template <typename X, typename T>
SSOD_CLONES static void softmax_statistics(const X* __restrict logits, int64_t stride, int64_t classes, int64_t n,
                                           T* __restrict maximum, T* __restrict sum) {
  constexpr int kLanes = 16;
  const int64_t whole = classes / kLanes * kLanes;
  for (int64_t row = 0; row < n; ++row) {
    const X* __restrict x = logits + row * stride;
    T high[kLanes], total[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      high[k] = k < classes - whole ? static_cast<T>(x[whole + k]) : minus_infinity<T>();
    }
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        high[k] = upper(static_cast<T>(x[i + k]), high[k]);
      }
    }
    const T top = fold<kLanes / 2>(high, [](T a, T b) { return upper(a, b); });
    for (int k = 0; k < kLanes; ++k) {
      total[k] = T(0);
    }
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        total[k] += exp_down(static_cast<T>(x[i + k]) - top);
      }
    }
    for (int64_t i = whole; i < classes; ++i) {
      total[i - whole] += exp_down(static_cast<T>(x[i]) - top);
    }
    maximum[row] = top;
    sum[row] = fold<kLanes / 2>(total, [](T a, T b) { return a + b; });
  }
}

// Costs of one target. `classes` holds the weighted class terms.
template <bool zero, typename T>
SSOD_CLONES static void cost_row(const CostTarget<T> target, const QueryPlanes<T> queries, const T* __restrict classes,
                                 const CostRule<T> rule, T* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = pair_cost<zero>(queries.box.at(j), queries.l1(j), target.box, target.l1, classes[j], rule);
  }
}

template <typename T>
SSOD_CLONES static void add_row(const T* __restrict extra, T* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] += extra[j];
  }
}

// Calls f with typed logits at the first query of the slice.
template <typename T, typename F>
void with_logits(const PredictionView& view, int64_t offset, F&& f) {
  using torch::headeronly::ScalarType;
  if (view.dtype == ScalarType::Half) {
    f(static_cast<const c10::Half*>(view.data) + offset);
  } else if (view.dtype == ScalarType::BFloat16) {
    f(static_cast<const c10::BFloat16*>(view.data) + offset);
  } else if (view.dtype == ScalarType::Double) {
    f(static_cast<const double*>(view.data) + offset);
  } else {
    f(static_cast<const float*>(view.data) + offset);
  }
}

// One call of fill_cost.
template <typename T>
class Filler {
 public:
  Filler(const CostCall<T>& call, const CostSlice& slice, CostWorkspace<T>& space)
      : call_(call), slice_(slice), space_(space), planes_(space.query_planes()) {
    if (call.image_hw) {
      h_ = call.image_hw[2 * slice.image];
      w_ = call.image_hw[2 * slice.image + 1];
    }
  }

  void run(T* out, int64_t ld, int64_t* keys) {
    read_targets();
    space_.least.assign(slice_.rows, -minus_infinity<T>());
    if (keys) {
      std::fill_n(keys, slice_.rows, slice_.queries > 0 ? 0 : kUnknownKey);
    }
    for (int64_t q = 0; q < slice_.queries; q += kQueryChunk) {
      const int64_t n = std::min(kQueryChunk, slice_.queries - q);
      read_queries(slice_.query0 + q, n);
      compute_classes(slice_.query0 + q, n);
      call_.rule.zero ? write_rows<true>(q, n, out, ld, keys) : write_rows<false>(q, n, out, ld, keys);
    }
  }

 private:
  L1Box<T> scaled(const T* box) const { return {box[0] / w_, box[1] / h_, box[2] / w_, box[3] / h_}; }

  // Targets as boxes, and the slots of their labels in order of first appearance.
  void read_targets() {
    const int64_t classes = call_.logits.width;
    int32_t* slots = space_.slot_of_class.reserve(classes);  // holds slot + 1, and 0 between calls
    space_.targets.resize(slice_.rows);
    space_.distinct.clear();
    for (int64_t t = 0; t < slice_.rows; ++t) {
      const T* box = call_.target_boxes + 4 * (slice_.row0 + t);
      const int64_t label = call_.labels[slice_.row0 + t];
      int32_t slot = call_.rule.class_mode == ClassMode::none ? 0 : -1;
      if (slot < 0 && label >= 0 && label < classes) {
        if (slots[label] == 0) {
          space_.distinct.push_back(label);
          slots[label] = static_cast<int32_t>(space_.distinct.size());
        }
        slot = slots[label] - 1;
      }
      space_.targets[t] = {make_box(box[0], box[1], box[2], box[3], call_.rule.format, call_.rule.zero), scaled(box),
                           slot};
    }
    for (const int64_t label : space_.distinct) {
      slots[label] = 0;
    }
  }

  // Boxes of the queries, [n, 4] side by side.
  const T* query_boxes(int64_t first, int64_t n) {
    const PredictionView& view = call_.boxes;
    const T* boxes = static_cast<const T*>(view.data) + view.offset(slice_.layer, slice_.image, first);
    if (view.query == 4) {
      return boxes;
    }
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(boxes + i * view.query, 4, space_.gathered + 4 * i);
    }
    return space_.gathered;
  }

  void read_queries(int64_t first, int64_t n) {
    const T* boxes = query_boxes(first, n);
    unpack_boxes(boxes, n, {call_.rule.format, call_.rule.zero, false}, planes_.box);
    unpack_l1(boxes, n, w_, h_, space_.planes[5], space_.planes[6], space_.planes[7], space_.planes[8]);
  }

  // Weighted class terms of the distinct labels.
  void compute_classes(int64_t first, int64_t n) {
    const auto distinct = static_cast<int64_t>(space_.distinct.size());
    if (call_.rule.class_mode == ClassMode::none) {
      std::fill_n(space_.classes.reserve(kQueryChunk), kQueryChunk, T(0));
      return;
    }
    T* terms = space_.classes.reserve(distinct * kQueryChunk);
    with_logits<T>(call_.logits, call_.logits.offset(slice_.layer, slice_.image, first), [&](const auto* x) {
      gather_columns(x, call_.logits.query, n, space_.distinct, terms);
      if (call_.rule.class_mode == ClassMode::softmax && distinct > 0) {
        softmax_statistics(x, call_.logits.query, call_.logits.width, n, space_.softmax[0], space_.softmax[1]);
      }
    });
    for (int64_t u = 0; u < distinct; ++u) {
      class_row(terms + u * kQueryChunk, whole_vectors(n));
    }
  }

  void class_row(T* x, int64_t n) {
    const CostRule<T>& rule = call_.rule;
    switch (rule.class_mode) {
      case ClassMode::focal:
        return rule.square ? focal_row<ClassMode::focal, true>(x, rule, n)
                           : focal_row<ClassMode::focal, false>(x, rule, n);
      case ClassMode::focal_logits:
        return rule.square ? focal_row<ClassMode::focal_logits, true>(x, rule, n)
                           : focal_row<ClassMode::focal_logits, false>(x, rule, n);
      case ClassMode::softmax:
        return softmax_row(x, space_.softmax[0], space_.softmax[1], rule.w_class, n);
      default:
        return prob_row(x, rule.w_class, n);
    }
  }

  // Whole vectors run fastest. They may end beyond the chunk where nothing is written yet: in the gap behind the row,
  // or in the next row.
  template <bool zero>
  void write_rows(int64_t q, int64_t n, T* out, int64_t ld, int64_t* keys) {
    const int64_t padded = whole_vectors(n);
    const bool own_gap = q + padded <= ld, one_chunk = slice_.queries <= kQueryChunk && n >= kWholeVector;
    for (int64_t t = 0; t < slice_.rows; ++t) {
      T* const wanted = out + t * ld + q;
      T* const row = own_gap || (one_chunk && t + 1 < slice_.rows) ? wanted : space_.row;
      write_row<zero>(t, q, n, row);
      if (keys) {
        offer(t, q, row_minimum(row, n), keys[t]);
      }
      if (row != wanted) {
        std::copy_n(row, n, wanted);
      }
    }
  }

  template <bool zero>
  void write_row(int64_t t, int64_t q, int64_t n, T* row) {
    const CostTarget<T>& target = space_.targets[t];
    if (target.slot < 0) {
      std::fill_n(row, n, static_cast<T>(NAN));
      return;
    }
    const T* classes = space_.classes.reserve(0) + target.slot * kQueryChunk;
    cost_row<zero>(target, planes_, classes, call_.rule, row, whole_vectors(n));
    if (call_.extra) {
      add_row(call_.extra + slice_.layer * call_.extra_layer + (slice_.row0 + t) * call_.extra_row + slice_.query0 + q,
              row, n);
    }
  }

  // Takes the minimum of a chunk into the row's key; the earliest query keeps a tie.
  void offer(int64_t t, int64_t q, const RowMinimum<T>& chunk, int64_t& key) {
    if (!chunk.finite || key == kUnknownKey) {
      key = kUnknownKey;
    } else if (chunk.value < space_.least[t]) {
      space_.least[t] = chunk.value;
      key = row_key(orderable(static_cast<float>(chunk.value)), q + chunk.column);
    }
  }

  const CostCall<T>& call_;
  const CostSlice& slice_;
  CostWorkspace<T>& space_;
  QueryPlanes<T> planes_;
  T h_ = 1, w_ = 1;
};

}  // namespace cost_rows

// Writes out[t * ld + q] for the targets t and queries q of the slice, both counted from its start, and where `keys` is
// not null the key of each row. ld >= slice.queries; what lies between a row's end and ld may be overwritten, nothing
// else is.
template <typename T>
void fill_cost(const CostCall<T>& call, const CostSlice& slice, CostWorkspace<T>& space, T* out, int64_t ld,
               int64_t* keys) {
  cost_rows::Filler<T>(call, slice, space).run(out, ld, keys);
}

// The part of a call that lies in tensors; the arguments are those of the op.
template <typename T>
CostCall<T> make_cost_call(const torch::stable::Tensor& logits, const torch::stable::Tensor& boxes,
                           const torch::stable::Tensor& labels, const torch::stable::Tensor& target_boxes,
                           const std::optional<torch::stable::Tensor>& image_hw,
                           const std::optional<torch::stable::Tensor>& extra_cost, const CostRule<T>& rule) {
  const auto data = [](const std::optional<torch::stable::Tensor>& t) {
    return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
  };
  return {rule,
          make_prediction_view(logits),
          make_prediction_view(boxes),
          static_cast<const int64_t*>(labels.data_ptr()),
          static_cast<const T*>(target_boxes.data_ptr()),
          data(image_hw),
          data(extra_cost),
          extra_cost ? extra_cost->stride(0) : 0,
          extra_cost ? extra_cost->stride(1) : 0};
}

}  // namespace ssod
