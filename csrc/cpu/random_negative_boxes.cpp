// Random boxes, and whether they overlap no positive of their image.
//
// Positives are taken in blocks of 32. What a block can overlap at most follows from the hull of its boxes and from
// their smallest and largest area, so that pairs are only computed for the few blocks that matter to a box.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/box_planes.h"
#include "cpu/box_rows.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "neighborhood.h"

namespace ssod {
namespace {

constexpr int64_t kBlock = kWholeVector;
constexpr double kMargin = 1e-5;  // far above the rounding of a bound, far below what it decides

// Blocks as planes: hull, extreme areas, and `slack`, which is infinite where a box is not finite.
template <typename T>
class Blocks {
 public:
  enum Plane { x1, y1, x2, y2, smallest, greatest, slack, count };

  explicit Blocks(int64_t blocks) : stride_(whole_vectors(blocks + kWholeVector)), values_(count * stride_) {}

  // The first of the planes, from one block on; the others follow `stride` values apart.
  const T* from(int64_t block) const { return values_.data() + block; }
  int64_t stride() const { return stride_; }

  void set(int64_t block, const Planes<T>& boxes, int64_t n) {
    // Areas in common are not negative; from 0 on, the slack is what bounds a block without any finite box.
    T hull[count] = {T(INFINITY), T(INFINITY), -T(INFINITY), -T(INFINITY), T(INFINITY), T(0), T(0)};
    for (int64_t i = 0; i < n; ++i) {
      hull[x1] = lower(boxes.x1[i], hull[x1]);
      hull[y1] = lower(boxes.y1[i], hull[y1]);
      hull[x2] = upper(boxes.x2[i], hull[x2]);
      hull[y2] = upper(boxes.y2[i], hull[y2]);
      hull[smallest] = lower(boxes.area[i], hull[smallest]);
      hull[greatest] = upper(boxes.area[i], hull[greatest]);
      hull[slack] += boxes.area[i] - boxes.area[i];  // NaN where a box is not finite
    }
    hull[slack] = hull[slack] == T(0) ? T(0) : T(INFINITY);
    for (int k = 0; k < count; ++k) {
      values_[k * stride_ + block] = hull[k];
    }
  }

 private:
  int64_t stride_;
  std::vector<T> values_;
};

// Positives of one image, in boxes and in blocks.
struct OwnPositives {
  int64_t begin, size;
  int64_t first_block, blocks;
};

// What the blocks seen so far say about a box.
template <typename T>
struct Verdict {
  T largest;
  bool finite;
};

// Largest of kWholeVector values, which it overwrites.
template <typename T>
SSOD_HD T largest_lane(T* lane) {
  static_assert(kWholeVector == 32);
  halve<16>(lane);
  halve<8>(lane);
  halve<4>(lane);
  halve<2>(lane);
  return upper(lane[0], lane[1]);
}

// Bounds on the overlaps of box a with kWholeVector blocks; returns the largest of them.
template <typename T>
SSOD_CLONES static T bound_blocks(const Box<T> a, const T* __restrict planes, int64_t stride, T* __restrict out) {
  using B = Blocks<T>;
  const T *x1 = planes + B::x1 * stride, *y1 = planes + B::y1 * stride, *x2 = planes + B::x2 * stride,
          *y2 = planes + B::y2 * stride, *smallest = planes + B::smallest * stride,
          *greatest = planes + B::greatest * stride, *slack = planes + B::slack * stride;
  alignas(64) T lane[kWholeVector];
  for (int64_t j = 0; j < kWholeVector; ++j) {
    const T iw = lower(a.x2, x2[j]) - upper(a.x1, x1[j]), ih = lower(a.y2, y2[j]) - upper(a.y1, y1[j]);
    const T inter = lower(positive(iw) * positive(ih), greatest[j]);
    const T one = upper(a.area, smallest[j]), both = a.area + smallest[j] - inter;
    const T bound = inter / upper(upper(one, both), T(1e-6)) + slack[j];
    out[j] = bound;
    lane[j] = bound;
  }
  return largest_lane(lane);
}

// Overlaps of box a with the n boxes of one block.
template <typename T>
SSOD_CLONES static Verdict<T> judge_block(const Box<T> a, const Planes<T> boxes, int64_t n) {
  alignas(64) T lane[kBlock];
  int nans = 0;
  for (int64_t j = 0; j < kBlock; ++j) {
    const T value = overlap<Mode::iou, false>(a, boxes.at(j), Eps<T>{T(1e-6), T(0), T(0)});
    lane[j] = j < n ? value : T(0);
  }
  for (int64_t j = 0; j < kBlock; ++j) {
    nans |= lane[j] != lane[j];
    lane[j] = upper(lane[j], T(0));
  }
  return {largest_lane(lane), nans == 0};
}

template <typename T>
SSOD_CLONES static void spread_tile(const Quads<T>& u, T image_w, T image_h, Quads<T>& out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const AxisPair<T> x = random_interval(u.a[i], u.c[i], image_w), y = random_interval(u.b[i], u.d[i], image_h);
    out.a[i] = x.first;
    out.b[i] = y.first;
    out.c[i] = x.second;
    out.d[i] = y.second;
  }
}

template <typename T>
struct Problem {
  const T* uniforms;
  Rows rows;
  const T* hw;
  int64_t per_image;
  Planes<T> positives;
  const Blocks<T>& blocks;
  const std::vector<OwnPositives>& owned;
  T threshold;
  T* boxes;
  bool* keep;
  T* maxima;  // null where they are not wanted
};

// Without maxima a box is done at its first hit, and blocks that cannot reach the threshold are left out; with them,
// blocks that cannot exceed what was found already.
template <typename T>
Verdict<T> judge_box(const Problem<T>& p, const Box<T>& a, const OwnPositives& own) {
  alignas(64) T bounds[kWholeVector];
  const bool finite = a.area == a.area;
  Verdict<T> verdict{T(0), finite};
  const T reach = T(1) + T(kMargin);
  const auto matters = [&](T bound) {
    return bound * reach > verdict.largest && (p.maxima || !(bound * reach < p.threshold));
  };
  for (int64_t first = 0; first < own.blocks && finite; first += kWholeVector) {
    if (!matters(bound_blocks(a, p.blocks.from(own.first_block + first), p.blocks.stride(), bounds))) {
      continue;
    }
    for (int64_t k = 0; k < std::min(kWholeVector, own.blocks - first); ++k) {
      if (!matters(bounds[k])) {
        continue;
      }
      const int64_t column = (first + k) * kBlock;
      const Verdict<T> block = judge_block(a, p.positives.from(own.begin + column), own.size - column);
      verdict = {upper(block.largest, verdict.largest), verdict.finite && block.finite};
      if (!p.maxima && !(verdict.finite && verdict.largest < p.threshold)) {
        return verdict;
      }
    }
  }
  return verdict;
}

template <typename T>
void run_rows(const Problem<T>& p, int64_t begin, int64_t end) {
  Quads<T> u, boxes;
  for (int64_t row = begin; row < end;) {
    const int64_t b = row / p.per_image, n = std::min({kBoxTile, end - row, (b + 1) * p.per_image - row});
    const OwnPositives& own = p.owned[b];
    load_quads(p.uniforms, p.rows, row, n, u);
    spread_tile(u, p.hw[2 * b + 1], p.hw[2 * b], boxes, n);
    join_quads(boxes, p.boxes + 4 * row, n);
    for (int64_t i = 0; i < n; ++i) {
      const Box<T> a = make_box(boxes.a[i], boxes.b[i], boxes.c[i], boxes.d[i], Format::xyxy, false);
      const Verdict<T> verdict = judge_box(p, a, own);
      p.keep[row + i] = own.size == 0 || (verdict.finite && verdict.largest < p.threshold);
      if (p.maxima) {
        p.maxima[row + i] = verdict.largest;
      }
    }
    row += n;
  }
}

// Bounds of the offsets are clamped; where they fall, the image owns nothing.
std::vector<OwnPositives> own_positives(const Tensor& offsets, int64_t bags, int64_t per_bag) {
  const auto* o = static_cast<const int64_t*>(offsets.data_ptr());
  std::vector<OwnPositives> owned;
  int64_t block = 0;
  for (int64_t b = 0; b + 1 < offsets.size(0); ++b) {
    const int64_t begin = std::clamp<int64_t>(o[b], 0, bags), end = std::clamp<int64_t>(o[b + 1], begin, bags);
    const int64_t size = (end - begin) * per_bag;
    owned.push_back({begin * per_bag, size, block, (size + kBlock - 1) / kBlock});
    block += owned.back().blocks;
  }
  return owned;
}

template <typename T>
Blocks<T> make_blocks(const std::vector<OwnPositives>& owned, const Planes<T>& positives) {
  Blocks<T> blocks(owned.empty() ? 0 : owned.back().first_block + owned.back().blocks);
  for (const OwnPositives& own : owned) {
    for (int64_t j = 0; j < own.blocks; ++j) {
      const int64_t first = j * kBlock;
      blocks.set(own.first_block + j, positives.from(own.begin + first), std::min(kBlock, own.size - first));
    }
  }
  return blocks;
}

std::tuple<Tensor, Tensor, Tensor> random_negative_boxes(Tensor uniforms, Tensor image_hw, Tensor positives,
                                                         Tensor offsets, double threshold, bool return_max) {
  const std::vector<int64_t> sizes = leading_sizes(uniforms, 2), none{0};
  const ScalarType dtype = uniforms.scalar_type();
  Tensor boxes = new_output(leading_sizes(uniforms, 3), dtype);
  Tensor keep = new_output(sizes, ScalarType::Bool);
  Tensor maxima = new_output(return_max ? sizes : none, dtype);
  const std::vector<OwnPositives> owned = own_positives(offsets, positives.size(0), positives.size(1));
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const PlaneBuffer<T> planes = unpack_all(make_box_set<T>(positives), {Format::xyxy, false, false});
    const Blocks<T> blocks = make_blocks(owned, planes.planes());
    const Rows rows = make_rows(uniforms, 2);
    const Problem<T> p{static_cast<const T*>(uniforms.data_ptr()),
                       rows,
                       static_cast<const T*>(image_hw.data_ptr()),
                       sizes[1],
                       planes.planes(),
                       blocks,
                       owned,
                       static_cast<T>(threshold),
                       static_cast<T*>(boxes.data_ptr()),
                       static_cast<bool*>(keep.data_ptr()),
                       return_max ? static_cast<T*>(maxima.data_ptr()) : nullptr};
    parallel_rows(rows.count, 512, [&](int64_t begin, int64_t end) { run_rows(p, begin, end); });
  };
  dtype == ScalarType::Double ? typed(double{}) : typed(float{});
  return {boxes, keep, maxima};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("random_negative_boxes", TORCH_BOX(&random_negative_boxes)); }

}  // namespace
}  // namespace ssod
