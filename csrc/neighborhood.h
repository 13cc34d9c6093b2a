// Boxes around boxes and points, and random boxes, one at a time; shared by the CPU and CUDA kernels. The order of
// operations is that of the references in ssod_fast/ops.
#pragma once

#include "box_deltas.h"
#include "boxes.h"
#include "image_rows.h"

namespace ssod {

constexpr int64_t kMaxFactors = 64;

// Corners of a box.
template <typename T>
struct Corners {
  T x1, y1, x2, y2;
};

// What a bag grows from. `poison` is NaN for a box that is not finite, and 0 else.
template <typename T>
struct Source {
  T cx, cy, w, h, poison;
};

template <typename T>
SSOD_HD Source<T> make_source(T x1, T y1, T x2, T y2) {
  const T poison = (x1 - x1) + (y1 - y1) + (x2 - x2) + (y2 - y2);
  return {(x1 + x2) / T(2) + poison, (y1 + y2) / T(2) + poison, x2 - x1, y2 - y1, poison};
}

// How one proposal of a bag differs from its source: factors of the sides, and offsets in units of the scaled sides.
template <typename T>
struct Step {
  T rw, rh, ox, oy;
};

// Step s of a bag whose sides are scaled by rw and rh: s = 0 stays, s = 1 + 4 k + {0, 1, 2, 3} goes left, right, up,
// down.
template <typename T>
SSOD_HD Step<T> make_step(T rw, T rh, int64_t s, const T* shakes) {
  Step<T> step{rw, rh, T(0), T(0)};
  if (s > 0) {
    const T shake = shakes[(s - 1) / 4];
    const int64_t way = (s - 1) % 4;
    step.ox = way == 0 ? -shake : (way == 1 ? shake : T(0));
    step.oy = way == 2 ? -shake : (way == 3 ? shake : T(0));
  }
  return step;
}

// Step of proposal p = (iw * R + ih) * S + s.
template <typename T>
SSOD_HD Step<T> step_of(int64_t p, const T* ratios, int64_t ratio_count, const T* shakes, int64_t shake_count) {
  const int64_t moves = 1 + 4 * shake_count, sides = p / moves;
  return make_step(ratios[sides / ratio_count], ratios[sides % ratio_count], p - sides * moves, shakes);
}

// A box of a bag, its scaled sides, and what the step added to the centre.
template <typename T>
struct Proposal {
  Corners<T> box;
  T w, h, dx, dy;
};

template <typename T>
SSOD_HD Proposal<T> propose(const Source<T>& source, const Step<T>& step) {
  const T w = source.w * step.rw, h = source.h * step.rh;
  const T dx = w * step.ox, dy = h * step.oy;
  const T cx = source.cx + dx, cy = source.cy + dy;
  return {{cx - w / T(2), cy - h / T(2), cx + w / T(2), cy + h / T(2)}, w, h, dx, dy};
}

// The lower of two numbers, NaN where either is: a size of an image may be NaN, and nothing is inside of such an image.
template <typename T>
SSOD_HD T lower_or_nan(T a, T b) {
  const T low = a < b ? a : b;  // two selections: loops over this one are vectorised
  return a != a ? a : low;
}

// Share of a box inside of (0, 0, w, h); 0 for one without area. Comparisons keep the NaN of a box that is not finite.
template <typename T>
SSOD_HD T share_inside(const Corners<T>& b, T w, T h) {
  const T low_x = b.x1 < T(0) ? T(0) : b.x1, low_y = b.y1 < T(0) ? T(0) : b.y1;
  const T iw = lower_or_nan(b.x2, w) - low_x, ih = lower_or_nan(b.y2, h) - low_y;
  const T inter = (iw < T(0) ? T(0) : iw) * (ih < T(0) ? T(0) : ih);
  const T area = (b.x2 - b.x1) * (b.y2 - b.y1);
  return inter / (area < T(1e-6) ? T(1e-6) : area);
}

template <typename T>
SSOD_HD T clipped(T x, T limit) {
  return lower_or_nan(x < T(0) ? T(0) : x, limit);
}

template <typename T>
SSOD_HD Corners<T> clip_box(const Corners<T>& b, T w, T h) {
  return {clipped(b.x1, w), clipped(b.y1, h), clipped(b.x2, w), clipped(b.y2, h)};
}

// Overlap of a box with the source of its bag, union raised to 1e-6.
template <typename T>
SSOD_HD T overlap_with_source(const Corners<T>& b, const Box<T>& source) {
  return overlap<Mode::iou, false>(make_box(b.x1, b.y1, b.x2, b.y2, Format::xyxy, false), source,
                                   Eps<T>{T(1e-6), T(0), T(0)});
}

// Deltas of one axis from a box of a bag to its source. The distance of the centres is what the step added, free of
// rounding.
template <typename T>
SSOD_HD AxisPair<T> delta_to_source(T side, T scaled, T moved, T poison, AxisScale<T> scale) {
  const T divisor = floored_side(scaled);
  return {-moved / divisor / scale.centre + poison, fast_log(floored_side(side) / divisor) / scale.size + poison};
}

// What a box around a point does where it leaves the image.
enum class Cut : int64_t { symmetry, clamp, ignore };

// One end of the shorter way from a point to the edges of its image, twice; NaN stays.
template <typename T>
SSOD_HD T shrunk(T side, T centre, T limit) {
  const T room = lower_or_nan(T(2) * centre, T(2) * (limit - centre));
  const T kept = lower_or_nan(side, room);
  return kept < T(0) ? T(0) : kept;
}

// A box of size scale * base * ratio by scale * base / ratio around (cx, cy), with base = min(w, h) / 100.
template <typename T>
SSOD_HD Corners<T> box_around(T cx, T cy, T scale, T ratio, T image_w, T image_h, Cut cut) {
  const T base = lower_or_nan(image_w, image_h) / T(100);
  T w = scale * base * ratio, h = scale * base / ratio;
  if (cut == Cut::symmetry) {
    w = shrunk(w, cx, image_w);
    h = shrunk(h, cy, image_h);
  }
  const Corners<T> box{cx - w / T(2), cy - h / T(2), cx + w / T(2), cy + h / T(2)};
  return cut == Cut::clamp ? clip_box(box, image_w, image_h) : box;
}

template <typename T>
SSOD_HD bool counts_as_valid(const Corners<T>& box, T image_w, T image_h, Cut cut, T threshold) {
  if (cut == Cut::ignore) {
    return share_inside(box, image_w, image_h) > threshold;
  }
  return (box.x2 - box.x1) * (box.y2 - box.y1) > T(0);
}

// Interval of a random box along one axis from two numbers in [0, 1): it starts up to a fifth of the image before the
// edge and ends as far behind.
template <typename T>
SSOD_HD AxisPair<T> random_interval(T u_low, T u_high, T image) {
  const T low = T(-0.2) * image + T(1.2) * image * u_low;
  return {low, low + (T(1.2) * image - low) * u_high};
}

}  // namespace ssod
