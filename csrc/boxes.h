// Maths of one pair of boxes, shared by the CPU and CUDA kernels and tested through tests/cpp/shared_maths.cpp.
//
// The order of operations is part of the contract: it is that of ssod_fast/ops/_overlaps.py, and with neither FMA
// contraction nor approximate division IoU and GIoU of valid boxes equal eager torchvision to the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#define SSOD_HD __host__ __device__ __forceinline__
#else
#define SSOD_HD inline __attribute__((always_inline))
#endif

namespace ssod {

enum class Mode : int64_t { iou, iof, giou, diou, ciou };
enum class Format : int64_t { xyxy, xywh, cxcywh };
enum class EpsMode : int64_t { zero, none, max, add };

// Corners, area, and the angle atan(w / h), which only CIoU reads. A box that is not finite has corners 0 and area NaN.
template <typename T>
struct Box {
  T x1, y1, x2, y2, area, angle;
};

// The eps modes of the peers in one form: denominators are max(x, floor) + add. Not read in mode "zero".
template <typename T>
struct Eps {
  T floor;
  T area;   // added to union and enclosing area
  T other;  // added to the diagonal and to CIoU's weight
};

template <typename T>
Eps<T> make_eps(EpsMode mode, double eps) {
  const T none = -static_cast<T>(INFINITY);
  const T e = static_cast<T>(eps);
  switch (mode) {
    case EpsMode::max:
      return {e, 0, 0};
    case EpsMode::add:
      return {none, e, e};
    case EpsMode::none:
      return {none, 0, e};
    default:
      return {none, 0, 0};
  }
}

// Calls f with the mode and "eps_mode is zero" as compile-time constants.
template <typename F>
void with_rule(Mode mode, bool zero, F&& f) {
  auto with_mode = [&](auto m) { zero ? f(m, std::true_type{}) : f(m, std::false_type{}); };
  switch (mode) {
    case Mode::iou:
      return with_mode(std::integral_constant<Mode, Mode::iou>{});
    case Mode::iof:
      return with_mode(std::integral_constant<Mode, Mode::iof>{});
    case Mode::giou:
      return with_mode(std::integral_constant<Mode, Mode::giou>{});
    case Mode::diou:
      return with_mode(std::integral_constant<Mode, Mode::diou>{});
    case Mode::ciou:
      return with_mode(std::integral_constant<Mode, Mode::ciou>{});
  }
}

// Calls f with a run-time flag as a compile-time constant.
template <typename F>
void with_flag(bool flag, F&& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Comparisons rather than fmin/fmax: one instruction each, and a NaN on the left yields the right-hand side.
template <typename T>
SSOD_HD T lower(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
SSOD_HD T upper(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
SSOD_HD T positive(T x) {
  return x > T(0) ? x : T(0);
}

// std::numeric_limits is not for device code.
template <typename T>
SSOD_HD T minus_infinity() {
  return -static_cast<T>(INFINITY);
}

// Corners and area of a box given as four numbers of `format`.
template <typename T>
SSOD_HD Box<T> make_box(T a, T b, T c, T d, Format format, bool zero) {
  const bool finite = (a - a) + (b - b) + (c - c) + (d - d) == T(0);
  Box<T> box{a, b, c, d, T(0), T(0)};
  if (format == Format::xywh) {
    box = {a, b, a + c, b + d, T(0), T(0)};
  } else if (format == Format::cxcywh) {
    box = {a - c / T(2), b - d / T(2), a + c / T(2), b + d / T(2), T(0), T(0)};
  }
  const T w = box.x2 - box.x1, h = box.y2 - box.y1;
  const T area = zero ? positive(w) * positive(h) : w * h;
  box.x1 = finite ? box.x1 : T(0);
  box.y1 = finite ? box.y1 : T(0);
  box.x2 = finite ? box.x2 : T(0);
  box.y2 = finite ? box.y2 : T(0);
  box.area = finite ? area : static_cast<T>(NAN);
  return box;
}

// atan(w / h); in mode "zero" of the clamped sides, where 0 / 0 counts as 0.
template <typename T>
SSOD_HD T box_angle(const Box<T>& box, bool zero) {
  const T w = box.x2 - box.x1, h = box.y2 - box.y1;
  return zero ? std::atan2(positive(w), positive(h)) : std::atan(w / h);
}

// What the overlap of a pair is made of.
template <typename T>
struct Pair {
  T iw, ih;  // sides of the intersection before the clamp at 0
  T inter;
  T raw_union;  // before the floor of eps mode "max"
  T union_;
  T ew, eh;  // sides of the enclosing box before the clamp at 0
  T dx, dy;  // twice the distance of the centres
};

template <Mode mode, bool zero, typename T>
SSOD_HD Pair<T> make_pair_values(const Box<T>& a, const Box<T>& b, const Eps<T>& eps) {
  Pair<T> p;
  p.iw = lower(a.x2, b.x2) - upper(a.x1, b.x1);
  p.ih = lower(a.y2, b.y2) - upper(a.y1, b.y1);
  p.inter = positive(p.iw) * positive(p.ih);
  // b.area - b.area is 0, or NaN for a box that is not finite.
  p.raw_union = mode == Mode::iof ? a.area + (b.area - b.area) : (a.area + b.area) - p.inter;
  p.union_ = zero || !(p.raw_union < eps.floor) ? p.raw_union : eps.floor;
  p.ew = upper(a.x2, b.x2) - lower(a.x1, b.x1);
  p.eh = upper(a.y2, b.y2) - lower(a.y1, b.y1);
  p.dx = (a.x1 + a.x2) - (b.x1 + b.x2);
  p.dy = (a.y1 + a.y2) - (b.y1 + b.y2);
  return p;
}

// num / den. In mode "zero" 0 where den <= 0; a NaN denominator stays NaN.
template <bool zero, typename T>
SSOD_HD T guarded_quotient(T num, T den, T add) {
  const T q = num / (zero ? den : den + add);
  return zero && den <= T(0) ? T(0) : q;
}

template <bool zero, typename T>
SSOD_HD T floored(T x, const Eps<T>& eps) {
  return zero || !(x < eps.floor) ? x : eps.floor;
}

template <typename T>
SSOD_HD T ciou_scale() {
  return static_cast<T>(0.40528473456935108577551785283891);  // 4 / pi^2
}

// Weight of CIoU's aspect term v (Zheng et al. 2020, equation 11).
template <bool zero, typename T>
SSOD_HD T ciou_alpha(T iou, T v, const Eps<T>& eps) {
  const T den = (T(1) - iou) + v;
  const T q = v / (zero ? den : floored<zero>(den, eps) + eps.other);
  return zero && v == T(0) ? T(0) : q;
}

// Overlap of boxes a (of boxes1) and b (of boxes2).
template <Mode mode, bool zero, typename T>
SSOD_HD T overlap(const Box<T>& a, const Box<T>& b, const Eps<T>& eps) {
  const Pair<T> p = make_pair_values<mode, zero>(a, b, eps);
  const T iou = guarded_quotient<zero>(p.inter, p.union_, eps.area);
  if constexpr (mode == Mode::iou || mode == Mode::iof) {
    return iou;
  }
  const T ew = positive(p.ew), eh = positive(p.eh);
  if constexpr (mode == Mode::giou) {
    const T enclosing = floored<zero>(ew * eh, eps);
    return iou - guarded_quotient<zero>(enclosing - p.union_, enclosing, eps.area);
  }
  const T diagonal = floored<zero>(ew * ew + eh * eh, eps);
  const T rho = (p.dx * p.dx + p.dy * p.dy) / T(4);
  const T diou = iou - guarded_quotient<zero>(rho, diagonal, eps.other);
  if constexpr (mode == Mode::ciou) {
    const T turn = b.angle - a.angle;
    const T v = ciou_scale<T>() * (turn * turn);
    return diou - ciou_alpha<zero>(iou, v, eps) * v;
  }
  return diou;
}

// Gradients with respect to the corners of a box.
template <typename T>
struct CornerGrads {
  T x1, y1, x2, y2;
};

// Share of the gradient that min (max) hands to the argument `smaller` (`larger`): 1, one half in a tie, or 0.
template <typename T>
SSOD_HD T tie_share(T smaller, T larger) {
  return smaller < larger ? T(1) : (smaller == larger ? T(0.5) : T(0));
}

// Share that the clamp at 0 passes on.
template <typename T>
SSOD_HD T clamp_share(T x) {
  return x >= T(0) ? T(1) : T(0);
}

// Derivatives of the overlap with respect to the values of Pair, times the incoming gradient. Unused ones stay 0.
template <typename T>
struct Partials {
  T inter, union_, ew, eh, rho, turn;
};

template <Mode mode, bool zero, typename T>
SSOD_HD Partials<T> make_partials(const Box<T>& a, const Box<T>& b, const Pair<T>& p, const Eps<T>& eps, T grad) {
  const T zero_t = T(0), one = T(1);
  const bool empty = zero && p.union_ <= zero_t;
  const T den = zero ? p.union_ : p.union_ + eps.area;
  const T inverse = empty ? zero_t : one / den;
  const T iou = p.inter * inverse;  // for the derivative only: the value divides
  const T floor_share = zero ? one : tie_share(eps.floor, p.raw_union);
  Partials<T> d{inverse, -(iou * inverse), zero_t, zero_t, zero_t, zero_t};
  if constexpr (mode == Mode::iou || mode == Mode::iof) {
    d.union_ *= floor_share;
    return {d.inter * grad, d.union_ * grad, zero_t, zero_t, zero_t, zero_t};
  }
  const T ew = positive(p.ew), eh = positive(p.eh);
  if constexpr (mode == Mode::giou) {
    const T raw = ew * eh;
    const T enclosing = floored<zero>(raw, eps);
    const T inv = zero && enclosing <= zero_t ? zero_t : one / (zero ? enclosing : enclosing + eps.area);
    const T share = zero ? one : tie_share(eps.floor, raw);
    const T d_enclosing = ((enclosing - p.union_) * inv - one) * inv * share * grad;
    d.union_ = (d.union_ + inv) * floor_share;
    return {d.inter * grad, d.union_ * grad, d_enclosing * eh, d_enclosing * ew, zero_t, zero_t};
  }
  const T raw = ew * ew + eh * eh;
  const T diagonal = floored<zero>(raw, eps);
  const T inv = zero && diagonal <= zero_t ? zero_t : one / (zero ? diagonal : diagonal + eps.other);
  const T rho = (p.dx * p.dx + p.dy * p.dy) / T(4);
  const T share = zero ? one : tie_share(eps.floor, raw);
  const T d_diagonal = rho * inv * inv * share * grad;
  d.union_ *= floor_share;
  if constexpr (mode == Mode::ciou) {
    const T turn = b.angle - a.angle;
    const T v = ciou_scale<T>() * (turn * turn);
    d.turn = -ciou_alpha<zero>(iou, v, eps) * (T(2) * ciou_scale<T>()) * turn * grad;
  }
  return {d.inter * grad, d.union_ * grad, d_diagonal * (T(2) * ew), d_diagonal * (T(2) * eh), -inv * grad, d.turn};
}

// Adds the gradients of a box's own sides, from its area and its angle.
template <Mode mode, bool zero, typename T>
SSOD_HD void add_side_gradients(const Box<T>& box, T d_area, T d_angle, CornerGrads<T>& grads) {
  const T raw_w = box.x2 - box.x1, raw_h = box.y2 - box.y1;
  const T w = zero ? positive(raw_w) : raw_w, h = zero ? positive(raw_h) : raw_h;
  T d_w = d_area * h, d_h = d_area * w;
  if constexpr (mode == Mode::ciou) {
    const T square = w * w + h * h;
    const T scale = square > T(0) ? d_angle / square : T(0);
    d_w += scale * h;
    d_h -= scale * w;
  }
  if constexpr (zero) {
    d_w *= clamp_share(raw_w);
    d_h *= clamp_share(raw_h);
  }
  grads.x1 -= d_w;
  grads.x2 += d_w;
  grads.y1 -= d_h;
  grads.y2 += d_h;
}

// Gradients of the ends of a and b along one axis, from those of the intersection's and the enclosing box's side.
template <bool outer, typename T>
SSOD_HD void axis_gradients(T a1, T a2, T b1, T b2, T d_inner, T d_outer, T& ga1, T& ga2, T& gb1, T& gb2) {
  const T first = tie_share(b1, a1), last = tie_share(a2, b2);  // shares of a in the larger start and the smaller end
  ga1 = -d_inner * first;
  gb1 = -d_inner * (T(1) - first);
  ga2 = d_inner * last;
  gb2 = d_inner * (T(1) - last);
  if constexpr (outer) {
    ga1 -= d_outer * (T(1) - first);
    gb1 -= d_outer * first;
    ga2 += d_outer * (T(1) - last);
    gb2 += d_outer * last;
  }
}

// Gradients of grad * overlap(a, b) with respect to the corners of both boxes; ties and clamps as in torch's autograd.
template <Mode mode, bool zero, bool nan_zero, typename T>
SSOD_HD void overlap_gradients(const Box<T>& a, const Box<T>& b, const Eps<T>& eps, T grad, CornerGrads<T>& ga,
                               CornerGrads<T>& gb) {
  constexpr bool outer = mode == Mode::giou || mode == Mode::diou || mode == Mode::ciou;
  const Pair<T> p = make_pair_values<mode, zero>(a, b, eps);
  Partials<T> d = make_partials<mode, zero>(a, b, p, eps, grad);
  if constexpr (nan_zero) {
    const T value = overlap<mode, zero>(a, b, eps);
    const bool bad = value != value;
    d = {bad ? T(0) : d.inter, bad ? T(0) : d.union_, bad ? T(0) : d.ew,
         bad ? T(0) : d.eh,    bad ? T(0) : d.rho,    bad ? T(0) : d.turn};
  }
  const T d_inter = mode == Mode::iof ? d.inter : d.inter - d.union_;
  const T d_iw = d_inter * positive(p.ih) * clamp_share(p.iw), d_ih = d_inter * positive(p.iw) * clamp_share(p.ih);
  axis_gradients<outer>(a.x1, a.x2, b.x1, b.x2, d_iw, d.ew * clamp_share(p.ew), ga.x1, ga.x2, gb.x1, gb.x2);
  axis_gradients<outer>(a.y1, a.y2, b.y1, b.y2, d_ih, d.eh * clamp_share(p.eh), ga.y1, ga.y2, gb.y1, gb.y2);
  add_side_gradients<mode, zero>(a, d.union_, -d.turn, ga);
  if constexpr (mode != Mode::iof) {
    add_side_gradients<mode, zero>(b, d.union_, d.turn, gb);
  }
  if constexpr (mode == Mode::diou || mode == Mode::ciou) {
    const T mx = d.rho * p.dx / T(2), my = d.rho * p.dy / T(2);
    ga = {ga.x1 + mx, ga.y1 + my, ga.x2 + mx, ga.y2 + my};
    gb = {gb.x1 - mx, gb.y1 - my, gb.x2 - mx, gb.y2 - my};
  }
}

// Gradients of corners as gradients of the four numbers of `format`.
template <typename T>
SSOD_HD CornerGrads<T> to_format(const CornerGrads<T>& g, Format format) {
  if (format == Format::xywh) {
    return {g.x1 + g.x2, g.y1 + g.y2, g.x2, g.y2};
  }
  if (format == Format::cxcywh) {
    return {g.x1 + g.x2, g.y1 + g.y2, (g.x2 - g.x1) / T(2), (g.y2 - g.y1) / T(2)};
  }
  return g;
}

}  // namespace ssod
