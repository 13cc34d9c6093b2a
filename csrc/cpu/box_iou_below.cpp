// Whether every overlap of a box with a set of others is below a threshold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "boxes.h"
#include "cpu/box_groups.h"
#include "cpu/box_planes.h"
#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"

namespace ssod {
namespace {

constexpr int64_t kRowTile = 64;
constexpr int64_t kColumnBlock = 256;  // small: a row stops after the block of its first hit

// What the overlaps of a box say: whether all are below the threshold, and the largest that is not NaN (or -inf).
template <typename T>
struct Verdict {
  bool below;
  T largest;
};

template <typename T>
SSOD_CLONES static bool all_below(const T* __restrict values, int64_t n, T threshold) {
  int above = 0;
  for (int64_t i = 0; i < n; ++i) {
    above |= !(values[i] < threshold);  // NaN is not below
  }
  return above == 0;
}

template <typename T>
struct Problem {
  BoxSet<T> set1;
  Planes<T> planes2;
  const BoxGroups& groups;
  BoxRule rule;
  Eps<T> eps;
  T threshold;
  bool* below;
  T* maxima;  // null where they are not wanted
};

template <Mode mode, bool zero, typename T>
Verdict<T> judge_row(const Problem<T>& p, const Box<T>& a, const BoxGroup& group) {
  alignas(64) T block[kColumnBlock];
  Verdict<T> row{true, minus_infinity<T>()};
  for (int64_t j = 0; j < group.cols && (row.below || p.maxima); j += kColumnBlock) {
    const int64_t n = std::min(kColumnBlock, group.cols - j);
    overlap_row<mode, zero>(a, p.planes2.from(group.col0 + j), p.eps, block, whole_vectors(n));
    row.below = row.below && all_below(block, n, p.threshold);
    if (p.maxima) {
      row.largest = upper(largest(block, n), row.largest);
    }
  }
  return row;
}

template <Mode mode, bool zero, typename T>
void run(const Problem<T>& p) {
  const auto tile = [&](const BoxGroup& group, int64_t first, int64_t count) {
    PlaneTile<T, kRowTile> a;
    p.set1.load_planes(first, count, p.rule, a.planes());
    for (int64_t i = 0; i < count; ++i) {
      const Verdict<T> row = judge_row<mode, zero>(p, a.planes().at(i), group);
      p.below[first + i] = row.below;
      if (p.maxima) {
        p.maxima[first + i] = row.largest == minus_infinity<T>() ? T(0) : row.largest;
      }
    }
  };
  const int64_t rows = p.set1.rows.count;
  parallel_rows(rows, mean_columns(p.groups, rows),
                [&](int64_t begin, int64_t end) { for_each_tile(p.groups, begin, end, kRowTile, tile); });
}

std::tuple<Tensor, Tensor> box_iou_below(Tensor boxes, Tensor others, std::optional<Tensor> offsets1,
                                         std::optional<Tensor> offsets2, double threshold, int64_t mode, int64_t fmt,
                                         int64_t eps_mode, double eps, bool return_max) {
  const std::vector<int64_t> sizes = leading_sizes(boxes, boxes.dim() - 1), none{0};
  Tensor below = new_output(sizes, ScalarType::Bool);
  Tensor maxima = new_output(return_max ? sizes : none, boxes.scalar_type());
  const BoxGroups groups = make_groups(boxes, others, offsets1, offsets2, boxes.numel() / 4, others.numel() / 4);
  const BoxRule rule = make_box_rule(mode, fmt, eps_mode);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const PlaneBuffer<T> planes2 = unpack_all(make_box_set<T>(others), rule);
    const Problem<T> p{make_box_set<T>(boxes),
                       planes2.planes(),
                       groups,
                       rule,
                       make_eps<T>(static_cast<EpsMode>(eps_mode), eps),
                       static_cast<T>(threshold),
                       static_cast<bool*>(below.data_ptr()),
                       return_max ? static_cast<T*>(maxima.data_ptr()) : nullptr};
    with_rule(static_cast<Mode>(mode), rule.zero, [&](auto mode_c, auto zero_c) { run<mode_c(), zero_c()>(p); });
  };
  boxes.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {below, maxima};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("box_iou_below", TORCH_BOX(&box_iou_below)); }

}  // namespace
}  // namespace ssod
