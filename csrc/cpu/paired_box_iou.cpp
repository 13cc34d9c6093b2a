// Overlaps of matched pairs and their gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "boxes.h"
#include "cpu/box_planes.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

constexpr int64_t kTile = 128;  // pairs: two tiles of planes and two of gradients stay in L1

int64_t work_per_pair(Mode mode) { return mode == Mode::ciou ? 64 : 8; }

template <Mode mode, bool zero, typename T>
SSOD_CLONES static void overlap_pairs(const Planes<T> a, const Planes<T> b, const Eps<T> eps, T* __restrict out,
                                      int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = overlap<mode, zero>(a.at(i), b.at(i), eps);
  }
}

// Gradients of corners, as four planes of kTile for each side.
template <Mode mode, bool zero, bool nan_zero, typename T>
SSOD_CLONES static void gradient_pairs(const Planes<T> a, const Planes<T> b, const T* __restrict grad, const Eps<T> eps,
                                       T* __restrict out1, T* __restrict out2, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    CornerGrads<T> ga, gb;
    overlap_gradients<mode, zero, nan_zero>(a.at(i), b.at(i), eps, grad[i], ga, gb);
    out1[i] = ga.x1;
    out1[kTile + i] = ga.y1;
    out1[2 * kTile + i] = ga.x2;
    out1[3 * kTile + i] = ga.y2;
    out2[i] = gb.x1;
    out2[kTile + i] = gb.y1;
    out2[2 * kTile + i] = gb.x2;
    out2[3 * kTile + i] = gb.y2;
  }
}

// Planes of corner gradients to [n, 4] in the format of the boxes.
template <typename T>
SSOD_CLONES static void interleave(const T* __restrict planes, Format format, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const CornerGrads<T> corners{planes[i], planes[kTile + i], planes[2 * kTile + i], planes[3 * kTile + i]};
    const CornerGrads<T> g = to_format(corners, format);
    out[4 * i] = g.x1;
    out[4 * i + 1] = g.y1;
    out[4 * i + 2] = g.x2;
    out[4 * i + 3] = g.y2;
  }
}

// What both directions need of a call.
template <typename T>
struct Pairs {
  BoxSet<T> set1, set2;
  BoxRule rule;
  Mode mode;
  Eps<T> eps;
  bool nan_zero;

  // Calls f(first, count, planes of boxes1, planes of boxes2) for tiles of [begin, end).
  template <typename F>
  void for_each_tile(int64_t begin, int64_t end, const F& f) const {
    PlaneTile<T, kTile> a, b;
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t n = std::min(kTile, end - i);
      set1.load_planes(i, n, rule, a.planes());
      set2.load_planes(i, n, rule, b.planes());
      f(i, n, a.planes(), b.planes());
    }
  }
};

template <typename T>
Pairs<T> make_pairs(Tensor& boxes1, Tensor& boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
                    bool nan_zero) {
  return {make_box_set<T>(boxes1),
          make_box_set<T>(boxes2),
          make_box_rule(mode, fmt, eps_mode),
          static_cast<Mode>(mode),
          make_eps<T>(static_cast<EpsMode>(eps_mode), eps),
          nan_zero};
}

template <typename T>
void forward(const Pairs<T>& p, T* out) {
  with_rule(p.mode, p.rule.zero, [&](auto mode, auto zero) {
    parallel_rows(p.set1.rows.count, work_per_pair(p.mode), [&](int64_t begin, int64_t end) {
      p.for_each_tile(begin, end, [&](int64_t i, int64_t n, const Planes<T>& a, const Planes<T>& b) {
        overlap_pairs<mode(), zero()>(a, b, p.eps, out + i, n);
        if (p.nan_zero) {
          nan_to_zero(out + i, n);
        }
      });
    });
  });
}

// The incoming gradients of pairs [first, first + n), side by side.
template <typename T>
const T* gather(const T* grad, const Rows& rows, int64_t first, int64_t n, T* buffer) {
  if (rows.dense(1)) {
    return grad + first;
  }
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = grad[rows.offset(first + i)];
  }
  return buffer;
}

// out1 and out2 may be null where that gradient is not wanted.
template <Mode mode, bool zero, bool nan_zero, typename T>
void backward_rows(const Pairs<T>& p, const T* grad, const Rows& grad_rows, T* out1, T* out2, int64_t begin,
                   int64_t end) {
  alignas(64) T g[kTile], planes1[4 * kTile], planes2[4 * kTile];
  p.for_each_tile(begin, end, [&](int64_t i, int64_t n, const Planes<T>& a, const Planes<T>& b) {
    gradient_pairs<mode, zero, nan_zero>(a, b, gather(grad, grad_rows, i, n, g), p.eps, planes1, planes2, n);
    if (out1) {
      interleave(planes1, p.rule.format, out1 + 4 * i, n);
    }
    if (out2) {
      interleave(planes2, p.rule.format, out2 + 4 * i, n);
    }
  });
}

template <typename T>
void backward(const Pairs<T>& p, const T* grad, const Rows& grad_rows, T* out1, T* out2) {
  with_rule(p.mode, p.rule.zero, [&](auto mode, auto zero) {
    with_flag(p.nan_zero, [&](auto nan_zero) {
      parallel_rows(p.set1.rows.count, 2 * work_per_pair(p.mode), [&](int64_t begin, int64_t end) {
        backward_rows<mode(), zero(), nan_zero()>(p, grad, grad_rows, out1, out2, begin, end);
      });
    });
  });
}

Tensor paired_box_iou(Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
                      bool nan_zero) {
  Tensor out = new_output(leading_sizes(boxes1, boxes1.dim() - 1), boxes1.scalar_type());
  const auto run = [&](auto t) {
    using T = decltype(t);
    forward(make_pairs<T>(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero), static_cast<T*>(out.data_ptr()));
  };
  boxes1.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return out;
}

std::tuple<Tensor, Tensor> paired_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt,
                                                   int64_t eps_mode, double eps, bool nan_zero, bool need1,
                                                   bool need2) {
  const std::vector<int64_t> sizes = leading_sizes(boxes1, boxes1.dim()), none{0};
  Tensor out1 = new_output(need1 ? sizes : none, boxes1.scalar_type());
  Tensor out2 = new_output(need2 ? sizes : none, boxes1.scalar_type());
  const Rows grad_rows = make_rows(grad, grad.dim());
  const auto run = [&](auto t) {
    using T = decltype(t);
    backward(make_pairs<T>(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero), static_cast<const T*>(grad.data_ptr()),
             grad_rows, need1 ? static_cast<T*>(out1.data_ptr()) : nullptr,
             need2 ? static_cast<T*>(out2.data_ptr()) : nullptr);
  };
  boxes1.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {out1, out2};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("paired_box_iou", TORCH_BOX(&paired_box_iou));
  m.impl("paired_box_iou_backward", TORCH_BOX(&paired_box_iou_backward));
}

}  // namespace
}  // namespace ssod
