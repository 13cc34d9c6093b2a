// Bags of boxes around boxes: all outputs of a bag from one pass over its steps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/box_rows.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "neighborhood.h"

namespace ssod {
namespace {

constexpr int64_t kVector = 32;  // loops run fastest over whole vectors; tables are padded to them

int64_t padded(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// The steps of a bag as planes, the same for all bags.
template <typename T>
class StepTable {
 public:
  StepTable(const std::vector<double>& ratios, const std::vector<double>& shakes)
      : count_(static_cast<int64_t>(ratios.size() * ratios.size() * (1 + 4 * shakes.size()))),
        stride_(padded(count_)),
        planes_(4 * stride_) {
    const std::vector<T> factors(ratios.begin(), ratios.end()), offsets(shakes.begin(), shakes.end());
    const int64_t moves = 1 + 4 * static_cast<int64_t>(shakes.size());
    T* plane = planes_.data();
    for (const T rw : factors) {
      for (const T rh : factors) {
        for (int64_t s = 0; s < moves; ++s, ++plane) {
          const Step<T> step = make_step(rw, rh, s, offsets.data());
          plane[0] = step.rw;
          plane[stride_] = step.rh;
          plane[2 * stride_] = step.ox;
          plane[3 * stride_] = step.oy;
        }
      }
    }
  }

  int64_t count() const { return count_; }
  const T* plane(int k) const { return planes_.data() + k * stride_; }

 private:
  int64_t count_, stride_;
  std::vector<T> planes_;
};

// One tile of a bag.
template <typename T>
struct Tile {
  Quads<T> box;
  alignas(64) T share[kBoxTile];
};

template <typename T>
SSOD_CLONES static void propose_tile(const Source<T> source, const T* __restrict rw, const T* __restrict rh,
                                     const T* __restrict ox, const T* __restrict oy, T image_w, T image_h,
                                     Tile<T>& tile, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Corners<T> b = propose(source, Step<T>{rw[i], rh[i], ox[i], oy[i]}).box;
    tile.box.a[i] = b.x1;
    tile.box.b[i] = b.y1;
    tile.box.c[i] = b.x2;
    tile.box.d[i] = b.y2;
    tile.share[i] = share_inside(b, image_w, image_h);
  }
}

template <typename T>
SSOD_CLONES static void mark_above(const T* __restrict values, T threshold, bool* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = values[i] > threshold;
  }
}

template <typename T>
SSOD_CLONES static void clip_tile(const Quads<T>& box, T image_w, T image_h, Quads<T>& out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Corners<T> b = clip_box(Corners<T>{box.a[i], box.b[i], box.c[i], box.d[i]}, image_w, image_h);
    out.a[i] = b.x1;
    out.b[i] = b.y1;
    out.c[i] = b.x2;
    out.d[i] = b.y2;
  }
}

template <typename T>
SSOD_CLONES static void overlap_tile(const Quads<T>& box, const Box<T> source, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = overlap_with_source(Corners<T>{box.a[i], box.b[i], box.c[i], box.d[i]}, source);
  }
}

// Deltas along one axis: `moves` and `factors` are the offsets and ratios of the steps.
template <typename T>
SSOD_CLONES static void delta_tile(T side, T poison, const T* __restrict factors, const T* __restrict moves,
                                   AxisScale<T> scale, T* __restrict centre, T* __restrict size, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = side * factors[i];
    const AxisPair<T> d = delta_to_source(side, scaled, scaled * moves[i], poison, scale);
    centre[i] = d.first;
    size[i] = d.second;
  }
}

template <typename T>
void write_rois(const T* boxes, T image, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[5 * i] = image;
    std::memcpy(out + 5 * i + 1, boxes + 4 * i, 4 * sizeof(T));
  }
}

// Null where an output is not wanted.
template <typename T>
struct Outputs {
  T* boxes;
  bool* valid;
  T *rois, *iof, *iou, *targets, *clipped;
};

template <typename T>
struct Problem {
  const T* boxes;
  Rows rows;
  ImageRows<T> images;
  const StepTable<T>& steps;
  T threshold;
  AxisScale<T> x_scale, y_scale;
  Outputs<T> out;
};

// What the tiles of one bag share.
template <typename T>
struct Bag {
  Source<T> source;
  Box<T> box;
  OwnImage<T> image;
};

template <typename T>
void write_extras(const Problem<T>& p, const Bag<T>& bag, const Tile<T>& tile, int64_t first, int64_t row, int64_t n) {
  const int64_t whole = padded(n);
  Quads<T> quads;
  if (p.out.rois) {
    write_rois(p.out.boxes + 4 * row, static_cast<T>(bag.image.index), p.out.rois + 5 * row, n);
  }
  if (p.out.iof) {
    std::copy_n(tile.share, n, p.out.iof + row);
  }
  if (p.out.iou) {
    overlap_tile(tile.box, bag.box, p.out.iou + row, n);
  }
  if (p.out.targets) {
    const T* rw = p.steps.plane(0) + first;
    const T* rh = p.steps.plane(1) + first;
    delta_tile(bag.source.w, bag.source.poison, rw, p.steps.plane(2) + first, p.x_scale, quads.a, quads.c, whole);
    delta_tile(bag.source.h, bag.source.poison, rh, p.steps.plane(3) + first, p.y_scale, quads.b, quads.d, whole);
    join_quads(quads, p.out.targets + 4 * row, n);
  }
  if (p.out.clipped) {
    clip_tile(tile.box, bag.image.w, bag.image.h, quads, whole);
    join_quads(quads, p.out.clipped + 4 * row, n);
  }
}

template <typename T>
void write_bag(const Problem<T>& p, int64_t g) {
  const T* b = p.boxes + p.rows.offset(g);
  const Bag<T> bag{make_source(b[0], b[1], b[2], b[3]), make_box(b[0], b[1], b[2], b[3], Format::xyxy, false),
                   p.images.of(g)};
  Tile<T> tile;
  for (int64_t first = 0; first < p.steps.count(); first += kBoxTile) {
    const int64_t n = std::min(kBoxTile, p.steps.count() - first), row = g * p.steps.count() + first;
    propose_tile(bag.source, p.steps.plane(0) + first, p.steps.plane(1) + first, p.steps.plane(2) + first,
                 p.steps.plane(3) + first, bag.image.w, bag.image.h, tile, padded(n));
    join_quads(tile.box, p.out.boxes + 4 * row, n);
    mark_above(tile.share, p.threshold, p.out.valid + row, n);
    write_extras(p, bag, tile, first, row, n);
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
T* data_or_null(bool wanted, Tensor& t) {
  return wanted ? static_cast<T*>(t.data_ptr()) : nullptr;
}

Results neighborhood_boxes(Tensor boxes, std::optional<Tensor> image_index, std::optional<Tensor> offsets,
                           Tensor image_hw, std::vector<double> ratios, std::vector<double> shakes,
                           double iof_threshold, bool want_rois, bool want_iof, bool want_iou,
                           std::vector<double> targets_std, bool want_clipped) {
  const bool want_targets = !targets_std.empty();
  const int64_t count = boxes.size(0), ratio_count = static_cast<int64_t>(ratios.size());
  const int64_t bag = ratio_count * ratio_count * (1 + 4 * static_cast<int64_t>(shakes.size()));
  const ScalarType dtype = boxes.scalar_type();
  const std::vector<int64_t> box_sizes{count, bag, 4}, sizes{count, bag}, none{0};
  Tensor bags = new_output(box_sizes, dtype);
  Tensor valid = new_output(sizes, ScalarType::Bool);
  Tensor rois = new_output(want_rois ? std::vector<int64_t>{count * bag, 5} : none, dtype);
  Tensor iof = new_output(want_iof ? sizes : none, dtype);
  Tensor iou = new_output(want_iou ? sizes : none, dtype);
  Tensor targets = new_output(want_targets ? box_sizes : none, dtype);
  Tensor clipped = new_output(want_clipped ? box_sizes : none, dtype);
  const Rows rows = make_rows(boxes, 1);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const StepTable<T> steps(ratios, shakes);
    const auto scale = [&](int k) { return want_targets ? static_cast<T>(targets_std[k]) : T(1); };
    const Problem<T> p{
        static_cast<const T*>(boxes.data_ptr()),
        rows,
        make_image_rows<T>(image_index, offsets, image_hw),
        steps,
        static_cast<T>(iof_threshold),
        {scale(0), scale(2)},
        {scale(1), scale(3)},
        {static_cast<T*>(bags.data_ptr()), static_cast<bool*>(valid.data_ptr()), data_or_null<T>(want_rois, rois),
         data_or_null<T>(want_iof, iof), data_or_null<T>(want_iou, iou), data_or_null<T>(want_targets, targets),
         data_or_null<T>(want_clipped, clipped)}};
    parallel_rows(count, 4 * bag, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        write_bag(p, g);
      }
    });
  };
  dtype == ScalarType::Double ? typed(double{}) : typed(float{});
  return {bags, valid, rois, iof, iou, targets, clipped};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("neighborhood_boxes", TORCH_BOX(&neighborhood_boxes)); }

}  // namespace
}  // namespace ssod
