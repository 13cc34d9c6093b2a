// Bags of boxes around points: one thread per box.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"
#include "cuda/factors.cuh"
#include "neighborhood.h"

namespace ssod {
namespace {

constexpr int kThreads = 128;

template <typename T>
struct Problem {
  const T* points;
  Rows rows;
  ImageRows<T> images;
  Factors<T> scales, ratios;
  Cut cut;
  T threshold;
  T* boxes;
  bool* valid;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) point_kernel(const __grid_constant__ Problem<T> p) {
  __shared__ T scales[kMaxFactors], ratios[kMaxFactors];
  p.scales.copy_to(scales);
  p.ratios.copy_to(ratios);
  __syncthreads();
  const int64_t bag = p.scales.count * p.ratios.count, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.rows.count * bag; i += step) {
    const int64_t g = i / bag, k = i - g * bag;
    const T* point = p.points + p.rows.offset(g);
    const T x = point[0], y = point[1], poison = (x - x) + (y - y);
    const OwnImage<T> image = p.images.of(g);
    const Corners<T> box = box_around(x + poison, y + poison, scales[k / p.ratios.count], ratios[k % p.ratios.count],
                                      image.w, image.h, p.cut);
    store_quad(p.boxes + 4 * i, box.x1, box.y1, box.x2, box.y2);
    p.valid[i] = counts_as_valid(box, image.w, image.h, p.cut, p.threshold);
  }
}

std::tuple<Tensor, Tensor> point_boxes(Tensor points, std::optional<Tensor> image_index, std::optional<Tensor> offsets,
                                       Tensor image_hw, std::vector<double> scales, std::vector<double> ratios,
                                       int64_t cut, double iof_threshold) {
  const DeviceScope device(points);
  const int64_t count = points.size(0), bag = static_cast<int64_t>(scales.size() * ratios.size());
  Tensor boxes = new_cuda_output(points, {count, bag, 4}, points.scalar_type());
  Tensor valid = new_cuda_output(points, {count, bag}, ScalarType::Bool);
  if (count * bag == 0) {
    return {boxes, valid};
  }
  const Rows rows = make_rows(points, 1);
  with_compute_type(points, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p{static_cast<const T*>(points.data_ptr()),
                       rows,
                       make_image_rows<T>(image_index, offsets, image_hw),
                       make_factors<T>(scales),
                       make_factors<T>(ratios),
                       static_cast<Cut>(cut),
                       static_cast<T>(iof_threshold),
                       static_cast<T*>(boxes.data_ptr()),
                       static_cast<bool*>(valid.data_ptr())};
    point_kernel<<<grid_blocks(count * bag, kThreads), kThreads, 0, device.stream()>>>(p);
  });
  check_launch("point_boxes");
  return {boxes, valid};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("point_boxes", TORCH_BOX(&point_boxes)); }

}  // namespace
}  // namespace ssod
