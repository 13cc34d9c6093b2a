// Gradient of the overlaps of all pairs: the pairs are computed again, block by block, and only sums leave the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "boxes.h"
#include "cpu/box_groups.h"
#include "cpu/box_planes.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"

namespace ssod {
namespace {

constexpr int64_t kRowTile = 64;
constexpr int64_t kColumnBlock = 512;  // five planes, four row blocks and four column sums: 26 KiB in float32
constexpr int64_t kLanes = 32;

// Gradients of the pairs (a, b[j]): those of a are written to four rows of kColumnBlock, those of b added to four
// column sums.
template <Mode mode, bool zero, bool nan_zero, typename T>
SSOD_CLONES static void gradient_row(const Box<T> a, const Planes<T> b, const T* __restrict grad, const Eps<T> eps,
                                     T* __restrict row, T* __restrict x1, T* __restrict y1, T* __restrict x2,
                                     T* __restrict y2, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    CornerGrads<T> ga, gb;
    overlap_gradients<mode, zero, nan_zero>(a, b.at(j), eps, grad[j], ga, gb);
    row[j] = ga.x1;
    row[kColumnBlock + j] = ga.y1;
    row[2 * kColumnBlock + j] = ga.x2;
    row[3 * kColumnBlock + j] = ga.y2;
    x1[j] += gb.x1;
    y1[j] += gb.y1;
    x2[j] += gb.x2;
    y2[j] += gb.y2;
  }
}

// Adds values[0..n) to kLanes partial sums: one running sum would not vectorise.
template <typename T>
SSOD_CLONES static void add_to_lanes(const T* __restrict values, int64_t n, T* __restrict lanes) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += values[j + lane];
    }
  }
  for (int64_t lane = 0; j + lane < n; ++lane) {
    lanes[lane] += values[j + lane];
  }
}

// The matrix of incoming gradients; rows may lie anywhere, columns may be strided (a broadcast gradient has stride 0).
template <typename T>
struct GradMatrix {
  const T* data;
  Rows rows;
  int64_t column_stride;

  const T* block(int64_t row, int64_t column, int64_t n, T* buffer) const {
    const T* start = data + rows.offset(row) + column * column_stride;
    if (column_stride == 1) {
      return start;
    }
    for (int64_t j = 0; j < n; ++j) {
      buffer[j] = start[j * column_stride];
    }
    return buffer;
  }
};

template <typename T>
struct Problem {
  BoxSet<T> set1;
  Planes<T> planes2;
  GradMatrix<T> grad;
  const BoxGroups& groups;
  BoxRule rule;
  Eps<T> eps;
  T* out1;  // [rows, 4], null where it is not wanted
};

template <typename T>
void store_row(T* out, const T* sums, Format format) {
  T total[4] = {};
  for (int64_t c = 0; c < 4; ++c) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      total[c] += sums[c * kLanes + lane];
    }
  }
  const CornerGrads<T> g = to_format(CornerGrads<T>{total[0], total[1], total[2], total[3]}, format);
  out[0] = g.x1;
  out[1] = g.y1;
  out[2] = g.x2;
  out[3] = g.y2;
}

// Rows [begin, end): gradients of boxes1 are finished, those of boxes2 added to `column_sums` (four planes of `cols`).
template <Mode mode, bool zero, bool nan_zero, typename T>
void scan(const Problem<T>& p, int64_t begin, int64_t end, T* column_sums, int64_t cols) {
  for_each_tile(p.groups, begin, end, kRowTile, [&](const BoxGroup& group, int64_t first, int64_t count) {
    PlaneTile<T, kRowTile> a;
    p.set1.load_planes(first, count, p.rule, a.planes());
    alignas(64) T row_sums[kRowTile][4 * kLanes] = {};
    alignas(64) T buffer[kColumnBlock], row[4 * kColumnBlock];
    for (int64_t j = 0; j < group.cols; j += kColumnBlock) {
      const int64_t n = std::min(kColumnBlock, group.cols - j), column = group.col0 + j;
      T* const sums = column_sums + column;
      for (int64_t i = 0; i < count; ++i) {
        const T* grad = p.grad.block(first + i, j, n, buffer);
        gradient_row<mode, zero, nan_zero>(a.planes().at(i), p.planes2.from(column), grad, p.eps, row, sums,
                                           sums + cols, sums + 2 * cols, sums + 3 * cols, n);
        for (int64_t c = 0; c < 4; ++c) {
          add_to_lanes(row + c * kColumnBlock, n, row_sums[i] + c * kLanes);
        }
      }
    }
    for (int64_t i = 0; p.out1 && i < count; ++i) {
      store_row(p.out1 + 4 * (first + i), row_sums[i], p.rule.format);
    }
  });
}

// Sums over the parts in their order, so that the result does not depend on the number of threads.
template <typename T>
void merge_parts(const std::vector<T>& sums, int64_t parts, int64_t cols, Format format, T* out2) {
  parallel_rows(cols, 4 * parts, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T total[4] = {};
      for (int64_t k = 0; k < 4 * parts; ++k) {
        total[k % 4] += sums[k * cols + j];
      }
      const CornerGrads<T> g = to_format(CornerGrads<T>{total[0], total[1], total[2], total[3]}, format);
      out2[4 * j] = g.x1;
      out2[4 * j + 1] = g.y1;
      out2[4 * j + 2] = g.x2;
      out2[4 * j + 3] = g.y2;
    }
  });
}

template <Mode mode, bool zero, bool nan_zero, typename T>
void run(const Problem<T>& p, int64_t cols, T* out2) {
  constexpr int64_t kPairsPerPart = 1 << 17, kMaxParts = 16;
  constexpr int64_t kRowsPerPart = 8;  // the column sums of all parts then hold half a value per pair at most
  const int64_t rows = p.set1.rows.count, pairs = rows * mean_columns(p.groups, rows);
  const int64_t most = std::clamp<int64_t>(rows / kRowsPerPart, 1, kMaxParts);
  const int64_t parts = std::clamp<int64_t>(pairs / kPairsPerPart, 1, most);
  std::vector<T> column_sums(parts * 4 * cols);
  parallel_rows(parts, kPairsPerPart, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      scan<mode, zero, nan_zero>(p, rows * k / parts, rows * (k + 1) / parts, column_sums.data() + 4 * k * cols, cols);
    }
  });
  if (out2) {
    merge_parts(column_sums, parts, cols, p.rule.format, out2);
  }
}

std::tuple<Tensor, Tensor> box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int64_t mode, int64_t fmt,
                                            int64_t eps_mode, double eps, bool nan_zero, bool need1, bool need2) {
  const std::vector<int64_t> none{0};
  Tensor out1 = new_output(need1 ? leading_sizes(boxes1, boxes1.dim()) : none, boxes1.scalar_type());
  Tensor out2 = new_output(need2 ? leading_sizes(boxes2, boxes2.dim()) : none, boxes1.scalar_type());
  const int64_t rows = boxes1.numel() / 4, cols = boxes2.numel() / 4;
  const BoxGroups groups = dense_groups(boxes1, boxes2, rows, cols);
  const BoxRule rule = make_box_rule(mode, fmt, eps_mode);
  const Rows grad_rows = make_rows(grad, grad.dim() - 1);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const PlaneBuffer<T> planes2 = unpack_all(make_box_set<T>(boxes2), rule);
    const Problem<T> p{make_box_set<T>(boxes1),
                       planes2.planes(),
                       {static_cast<const T*>(grad.data_ptr()), grad_rows, grad.stride(grad.dim() - 1)},
                       groups,
                       rule,
                       make_eps<T>(static_cast<EpsMode>(eps_mode), eps),
                       need1 ? static_cast<T*>(out1.data_ptr()) : nullptr};
    T* const data2 = need2 ? static_cast<T*>(out2.data_ptr()) : nullptr;
    with_rule(static_cast<Mode>(mode), rule.zero, [&](auto mode_c, auto zero_c) {
      with_flag(nan_zero, [&](auto nan_zero_c) { run<mode_c(), zero_c(), nan_zero_c()>(p, cols, data2); });
    });
  };
  boxes1.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {out1, out2};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("box_iou_backward", TORCH_BOX(&box_iou_backward)); }

}  // namespace
}  // namespace ssod
