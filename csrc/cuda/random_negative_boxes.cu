// Random boxes, and whether they overlap no positive of their image: one warp per box, which stops at its first hit.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/boxes.cuh"
#include "cuda/factors.cuh"
#include "neighborhood.h"

namespace ssod {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;

template <typename T>
struct Problem {
  BoxSet<T> uniforms, positives;
  const T* hw;
  const int64_t* offsets;
  int64_t per_image, bags, per_bag;
  BoxRule<T> rule;
  T threshold;
  T* boxes;
  bool* keep;
  T* maxima;  // null where they are not wanted

  // Positives of image b. Bounds are clamped; where they fall, the image owns nothing.
  __device__ __forceinline__ Range own(int64_t b) const {
    const int64_t begin = Partners::clamped(offsets[b], bags), end = Partners::clamped(offsets[b + 1], bags);
    return {begin * per_bag, end > begin ? (end - begin) * per_bag : 0};
  }
};

template <typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) negative_kernel(const __grid_constant__ Problem<T> p) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
  if (row >= p.uniforms.rows.count) {
    return;
  }
  const int64_t b = row / p.per_image;
  T u[4];
  p.uniforms.read(row, u);
  const AxisPair<T> x = random_interval(u[0], u[2], p.hw[2 * b + 1]), y = random_interval(u[1], u[3], p.hw[2 * b]);
  const Box<T> a = make_box(x.first, y.first, x.second, y.second, Format::xyxy, false);
  const Range range = p.own(b);
  bool below = true;
  T largest = T(0);
  for (int64_t start = 0; start < range.size && (below || p.maxima); start += kWarp) {
    const int64_t j = start + threadIdx.x;
    bool hit = false;
    if (j < range.size) {
      const Box<T> other = p.positives.template load<Mode::iou>(range.begin + j, p.rule);
      const T value = overlap<Mode::iou, false>(a, other, p.rule.eps);
      hit = !(value < p.threshold);  // NaN is not below
      largest = upper(value, largest);
    }
    below = below && !__any_sync(0xffffffffu, hit);
  }
  for (int distance = kWarp / 2; p.maxima && distance > 0; distance /= 2) {
    largest = upper(largest, __shfl_down_sync(0xffffffffu, largest, distance));
  }
  if (threadIdx.x == 0) {
    store_quad(p.boxes + 4 * row, x.first, y.first, x.second, y.second);
    p.keep[row] = below;
    if (p.maxima) {
      p.maxima[row] = largest;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> random_negative_boxes(Tensor uniforms, Tensor image_hw, Tensor positives,
                                                         Tensor offsets, double threshold, bool return_max) {
  const DeviceScope device(uniforms);
  const std::vector<int64_t> sizes = first_sizes(uniforms, 2), none{0};
  Tensor boxes = new_cuda_output(uniforms, first_sizes(uniforms, 3), uniforms.scalar_type());
  Tensor keep = new_cuda_output(uniforms, sizes, ScalarType::Bool);
  Tensor maxima = new_cuda_output(uniforms, return_max ? sizes : none, uniforms.scalar_type());
  const int64_t rows = keep.numel();
  if (rows == 0) {
    return {boxes, keep, maxima};
  }
  with_compute_type(uniforms, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p{
        make_box_set<T>(uniforms),
        make_box_set<T>(positives),
        static_cast<const T*>(image_hw.data_ptr()),
        static_cast<const int64_t*>(offsets.data_ptr()),
        sizes[1],
        positives.size(0),
        positives.size(1),
        make_box_rule<T>(static_cast<int64_t>(Format::xyxy), static_cast<int64_t>(EpsMode::max), 1e-6, false),
        static_cast<T>(threshold),
        static_cast<T*>(boxes.data_ptr()),
        static_cast<bool*>(keep.data_ptr()),
        return_max ? static_cast<T*>(maxima.data_ptr()) : nullptr};
    negative_kernel<<<static_cast<unsigned>(ceil_div(rows, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), 0,
                      device.stream()>>>(p);
  });
  check_launch("random_negative_boxes");
  return {boxes, keep, maxima};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CUDA, m) { m.impl("random_negative_boxes", TORCH_BOX(&random_negative_boxes)); }

}  // namespace
}  // namespace ssod
