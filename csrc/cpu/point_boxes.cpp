// Bags of boxes around points.
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

template <typename T>
struct Problem {
  const T* points;
  Rows rows;
  ImageRows<T> images;
  std::vector<T> scales, ratios;  // [M]: of every box of a bag
  Cut cut;
  T threshold;
  T* boxes;
  bool* valid;
};

template <typename T>
SSOD_CLONES static void surround(T cx, T cy, const T* __restrict scales, const T* __restrict ratios,
                                 const OwnImage<T> image, Cut cut, T threshold, Quads<T>& out, bool* __restrict valid,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Corners<T> b = box_around(cx, cy, scales[i], ratios[i], image.w, image.h, cut);
    out.a[i] = b.x1;
    out.b[i] = b.y1;
    out.c[i] = b.x2;
    out.d[i] = b.y2;
    valid[i] = counts_as_valid(b, image.w, image.h, cut, threshold);
  }
}

template <typename T>
void write_bag(const Problem<T>& p, int64_t g) {
  const T* point = p.points + p.rows.offset(g);
  const T poison = (point[0] - point[0]) + (point[1] - point[1]);
  const OwnImage<T> image = p.images.of(g);
  const int64_t count = static_cast<int64_t>(p.scales.size());
  Quads<T> tile;
  for (int64_t first = 0; first < count; first += kBoxTile) {
    const int64_t n = std::min(kBoxTile, count - first), row = g * count + first;
    surround(point[0] + poison, point[1] + poison, p.scales.data() + first, p.ratios.data() + first, image, p.cut,
             p.threshold, tile, p.valid + row, n);
    join_quads(tile, p.boxes + 4 * row, n);
  }
}

std::tuple<Tensor, Tensor> point_boxes(Tensor points, std::optional<Tensor> image_index, std::optional<Tensor> offsets,
                                       Tensor image_hw, std::vector<double> scales, std::vector<double> ratios,
                                       int64_t cut, double iof_threshold) {
  const int64_t count = points.size(0), bag = static_cast<int64_t>(scales.size() * ratios.size());
  Tensor boxes = new_output({count, bag, 4}, points.scalar_type());
  Tensor valid = new_output({count, bag}, ScalarType::Bool);
  const Rows rows = make_rows(points, 1);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    Problem<T> p{static_cast<const T*>(points.data_ptr()),
                 rows,
                 make_image_rows<T>(image_index, offsets, image_hw),
                 {},
                 {},
                 static_cast<Cut>(cut),
                 static_cast<T>(iof_threshold),
                 static_cast<T*>(boxes.data_ptr()),
                 static_cast<bool*>(valid.data_ptr())};
    for (const double scale : scales) {
      p.scales.insert(p.scales.end(), ratios.size(), static_cast<T>(scale));
      p.ratios.insert(p.ratios.end(), ratios.begin(), ratios.end());
    }
    parallel_rows(count, 4 * bag, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        write_bag(p, g);
      }
    });
  };
  points.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {boxes, valid};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("point_boxes", TORCH_BOX(&point_boxes)); }

}  // namespace
}  // namespace ssod
