// Overlaps of all pairs, dense or ragged, and their gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>
#include <type_traits>

#include "boxes.h"
#include "cpu/box_groups.h"
#include "cpu/box_planes.h"
#include "cpu/outputs.h"

namespace ssod {
namespace {

constexpr int64_t kRowTile = 64;
constexpr int64_t kColumnBlock = 1024;  // five planes and the row block fill half of a 48 KiB L1

// One problem, whatever its dtypes: what an op got, grouped.
struct Problem {
  Tensor boxes1, boxes2;
  BoxGroups groups;
  Mode mode;
  BoxRule rule;
  EpsMode eps_mode;
  double eps;
  bool nan_zero;
};

// Result rows: row i starts at data + i * stride; columns that its group lacks hold `pad`.
template <typename Out>
struct Matrix {
  Out* data;
  int64_t stride;
  Out pad;
};

// Writes one block of a row, through L1 where the result has another dtype than the maths. Up to `spare` values behind
// the block may be overwritten.
template <Mode mode, bool zero, typename T, typename Out>
void write_block(const Box<T>& a, const Planes<T>& b, const Eps<T>& eps, bool nan_zero, Out* out, int64_t n,
                 int64_t spare) {
  if constexpr (std::is_same_v<T, Out>) {
    overlap_row<mode, zero>(a, b, eps, out, std::min(whole_vectors(n), n + spare));
    if (nan_zero) {
      nan_to_zero(out, n);
    }
  } else {
    alignas(64) T block[kColumnBlock];
    overlap_row<mode, zero>(a, b, eps, block, whole_vectors(n));
    if (nan_zero) {
      nan_to_zero(block, n);
    }
    std::transform(block, block + n, out, [](T value) { return static_cast<Out>(value); });
  }
}

// Rows [first, first + count) of one group.
template <Mode mode, bool zero, typename T, typename Out>
void fill_tile(const Problem& p, const BoxSet<T>& set1, const Planes<T>& planes2, const Matrix<Out>& out,
               const BoxGroup& group, int64_t first, int64_t count) {
  const Eps<T> eps = make_eps<T>(p.eps_mode, p.eps);
  PlaneTile<T, kRowTile> a;
  set1.load_planes(first, count, p.rule, a.planes());
  const int64_t cols = std::min(group.cols, out.stride);
  // Where a row is one block and ends where the next begins, it may spill into the rows that this loop writes later.
  const bool spills = cols == out.stride && cols <= kColumnBlock;
  for (int64_t j = 0; j < cols; j += kColumnBlock) {
    const Planes<T> b = planes2.from(group.col0 + j);
    for (int64_t i = 0; i < count; ++i) {
      write_block<mode, zero>(a.planes().at(i), b, eps, p.nan_zero, out.data + (first + i) * out.stride + j,
                              std::min(kColumnBlock, cols - j), spills ? (count - 1 - i) * cols : 0);
    }
  }
  for (int64_t i = first; cols < out.stride && i < first + count; ++i) {
    std::fill(out.data + i * out.stride + cols, out.data + (i + 1) * out.stride, out.pad);
  }
}

template <Mode mode, bool zero, typename T, typename Out>
void fill(const Problem& p, const BoxSet<T>& set1, const Planes<T>& planes2, const Matrix<Out>& out) {
  const auto tile = [&](const BoxGroup& group, int64_t first, int64_t count) {
    fill_tile<mode, zero>(p, set1, planes2, out, group, first, count);
  };
  parallel_rows(set1.rows.count, out.stride,
                [&](int64_t begin, int64_t end) { for_each_tile(p.groups, begin, end, kRowTile, tile); });
}

template <typename T, typename Out>
void fill_typed(Problem& p, Tensor& out, int64_t stride, double pad) {
  const BoxSet<T> set1 = make_box_set<T>(p.boxes1), set2 = make_box_set<T>(p.boxes2);
  const PlaneBuffer<T> planes2 = unpack_all(set2, p.rule);
  const Matrix<Out> matrix{static_cast<Out*>(out.data_ptr()), stride, static_cast<Out>(pad)};
  with_rule(p.mode, p.rule.zero,
            [&](auto mode, auto zero) { fill<mode(), zero()>(p, set1, planes2.planes(), matrix); });
}

template <typename T>
void fill_as(Problem& p, Tensor& out, int64_t stride, double pad) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return fill_typed<T, float>(p, out, stride, pad);
    case ScalarType::Double:
      return fill_typed<T, double>(p, out, stride, pad);
    case ScalarType::Half:
      return fill_typed<T, c10::Half>(p, out, stride, pad);
    case ScalarType::BFloat16:
      return fill_typed<T, c10::BFloat16>(p, out, stride, pad);
    default:
      STD_TORCH_CHECK(false, "box_iou: result dtype must be float64, float32, float16 or bfloat16");
  }
}

void fill_any(Problem& p, Tensor& out, int64_t stride, double pad) {
  p.boxes1.scalar_type() == ScalarType::Double ? fill_as<double>(p, out, stride, pad)
                                               : fill_as<float>(p, out, stride, pad);
}

Problem dense_problem(const Tensor& boxes1, const Tensor& boxes2, int64_t mode, int64_t fmt, int64_t eps_mode,
                      double eps, bool nan_zero) {
  BoxGroups groups = dense_groups(boxes1, boxes2, boxes1.numel() / 4, boxes2.numel() / 4);
  return {boxes1,
          boxes2,
          std::move(groups),
          static_cast<Mode>(mode),
          make_box_rule(mode, fmt, eps_mode),
          static_cast<EpsMode>(eps_mode),
          eps,
          nan_zero};
}

void box_iou_out(const Tensor& boxes1, const Tensor& boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
                 bool nan_zero, Tensor out) {
  Problem p = dense_problem(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero);
  fill_any(p, out, boxes2.size(boxes2.dim() - 2), 0);
}

Tensor box_iou(const Tensor& boxes1, const Tensor& boxes2, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
               bool nan_zero, ScalarType dtype) {
  std::vector<int64_t> sizes = leading_sizes(boxes1, boxes1.dim() - 1);
  sizes.push_back(boxes2.size(boxes2.dim() - 2));
  Tensor out = new_output(sizes, dtype);
  box_iou_out(boxes1, boxes2, mode, fmt, eps_mode, eps, nan_zero, out);
  return out;
}

Tensor ragged_box_iou(const Tensor& boxes1, const Tensor& offsets1, const Tensor& boxes2, const Tensor& offsets2,
                      int64_t max_boxes2, double pad_value, int64_t mode, int64_t fmt, int64_t eps_mode, double eps,
                      bool nan_zero, ScalarType dtype) {
  const int64_t rows = boxes1.size(0), cols = boxes2.size(0);
  Tensor out = new_output({rows, max_boxes2}, dtype);
  Problem p{boxes1,
            boxes2,
            ragged_groups(offsets1, offsets2, rows, cols),
            static_cast<Mode>(mode),
            make_box_rule(mode, fmt, eps_mode),
            static_cast<EpsMode>(eps_mode),
            eps,
            nan_zero};
  fill_any(p, out, max_boxes2, pad_value);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou));
  m.impl("box_iou.out", TORCH_BOX(&box_iou_out));
  m.impl("ragged_box_iou", TORCH_BOX(&ragged_box_iou));
}

}  // namespace
}  // namespace ssod
