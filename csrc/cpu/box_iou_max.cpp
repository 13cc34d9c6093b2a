// The best partner of each box, along one or both sides, without the matrix.
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
constexpr int64_t kColumnBlock = 1024;

// Position of the first of values[0..n) that equals `wanted`; it must be there.
template <typename T>
SSOD_CLONES static int64_t position(const T* __restrict values, int64_t n, T wanted) {
  constexpr int64_t kPart = 256;
  for (int64_t i = 0; i < n; i += kPart) {
    const int part = static_cast<int>(std::min(kPart, n - i));
    int first = part;
    for (int k = 0; k < part; ++k) {
      const int here = values[i + k] == wanted ? k : part;
      first = here < first ? here : first;
    }
    if (first < part) {
      return i + first;
    }
  }
  return n;
}

// Column maxima: merges one row into them. The earliest row keeps a tie.
template <typename T>
SSOD_CLONES static void merge_row(const T* __restrict values, int32_t row, T* __restrict best, int32_t* __restrict arg,
                                  int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const bool better = values[j] > best[j];
    best[j] = better ? values[j] : best[j];
    arg[j] = better ? row : arg[j];
  }
}

// Maxima so far, -1 where there is none.
template <typename T>
struct Best {
  std::vector<T> value;
  std::vector<int32_t> arg;

  explicit Best(int64_t n) : value(n, minus_infinity<T>()), arg(n, -1) {}
};

template <typename T>
struct Result {
  T* values;
  int64_t* indices;

  bool wanted() const { return values != nullptr; }
  void set(int64_t i, T value, int64_t index) const {
    values[i] = index < 0 ? T(0) : value;
    indices[i] = index;
  }
};

template <typename T>
struct Problem {
  BoxSet<T> set1;
  Planes<T> planes2;
  const BoxGroups& groups;
  BoxRule rule;
  Eps<T> eps;
  Result<T> rows;
};

// Rows [begin, end): row maxima go to the result, column maxima to `columns` where it is given.
template <Mode mode, bool zero, typename T>
void scan(const Problem<T>& p, int64_t begin, int64_t end, Best<T>* columns) {
  for_each_tile(p.groups, begin, end, kRowTile, [&](const BoxGroup& group, int64_t first, int64_t count) {
    PlaneTile<T, kRowTile> a;
    p.set1.load_planes(first, count, p.rule, a.planes());
    T best[kRowTile];
    int64_t arg[kRowTile];
    std::fill(best, best + count, minus_infinity<T>());
    std::fill(arg, arg + count, -1);
    for (int64_t j = 0; j < group.cols; j += kColumnBlock) {
      const int64_t n = std::min(kColumnBlock, group.cols - j), column = group.col0 + j;
      const int64_t padded = whole_vectors(n);
      for (int64_t i = 0; i < count; ++i) {
        alignas(64) T block[kColumnBlock];
        overlap_row<mode, zero>(a.planes().at(i), p.planes2.from(column), p.eps, block, padded);
        if (p.rows.wanted()) {
          const T top = largest(block, n);
          if (top > best[i]) {
            best[i] = top;
            arg[i] = j + position(block, padded, top);
          }
        }
        if (columns) {
          merge_row(block, static_cast<int32_t>(first + i - group.row0), &columns->value[column], &columns->arg[column],
                    n);
        }
      }
    }
    for (int64_t i = 0; p.rows.wanted() && i < count; ++i) {
      p.rows.set(first + i, best[i], arg[i]);
    }
  });
}

// Merges the column maxima of consecutive parts of the rows; the earliest part keeps a tie.
template <typename T>
void merge_parts(const std::vector<Best<T>>& parts, int64_t cols, const Result<T>& result) {
  for (int64_t j = 0; j < cols; ++j) {
    T value = parts[0].value[j];
    int32_t arg = parts[0].arg[j];
    for (size_t k = 1; k < parts.size(); ++k) {
      if (parts[k].value[j] > value) {
        value = parts[k].value[j];
        arg = parts[k].arg[j];
      }
    }
    result.set(j, value, arg);
  }
}

template <Mode mode, bool zero, typename T>
void run(const Problem<T>& p, int64_t cols, const Result<T>& columns) {
  const int64_t rows = p.set1.rows.count, work = mean_columns(p.groups, rows);
  if (!columns.wanted()) {
    parallel_rows(rows, work,
                  [&](int64_t begin, int64_t end) { scan<mode, zero>(p, begin, end, static_cast<Best<T>*>(nullptr)); });
    return;
  }
  constexpr int64_t kPairsPerPart = 1 << 18;
  const int64_t parts = std::clamp<int64_t>(rows * work / kPairsPerPart, 1, torch::stable::get_num_threads());
  std::vector<Best<T>> best(parts, Best<T>(cols));
  parallel_rows(parts, kPairsPerPart, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      scan<mode, zero>(p, rows * k / parts, rows * (k + 1) / parts, &best[k]);
    }
  });
  merge_parts(best, cols, columns);
}

struct Outputs {
  Tensor values, indices;

  Outputs(const Tensor& boxes, bool wanted)
      : values(new_output(sizes(boxes, wanted), boxes.scalar_type())),
        indices(new_output(sizes(boxes, wanted), ScalarType::Long)) {}

  static std::vector<int64_t> sizes(const Tensor& boxes, bool wanted) {
    return wanted ? leading_sizes(boxes, boxes.dim() - 1) : std::vector<int64_t>{0};
  }

  template <typename T>
  Result<T> result(bool wanted) const {
    return wanted ? Result<T>{static_cast<T*>(values.data_ptr()), static_cast<int64_t*>(indices.data_ptr())}
                  : Result<T>{};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> box_iou_max(Tensor boxes1, Tensor boxes2, std::optional<Tensor> offsets1,
                                                       std::optional<Tensor> offsets2, int64_t mode, int64_t fmt,
                                                       int64_t eps_mode, double eps, bool rows, bool cols) {
  Outputs out1(boxes1, rows), out2(boxes2, cols);
  const int64_t n = boxes1.numel() / 4, m = boxes2.numel() / 4;
  const BoxGroups groups = make_groups(boxes1, boxes2, offsets1, offsets2, n, m);
  const BoxRule rule = make_box_rule(mode, fmt, eps_mode);
  const auto typed = [&](auto t) {
    using T = decltype(t);
    const PlaneBuffer<T> planes2 = unpack_all(make_box_set<T>(boxes2), rule);
    // A row that is wanted but empty still has a pointer to nothing; that is as good as not wanted.
    const Problem<T> p{
        make_box_set<T>(boxes1), planes2.planes(), groups, rule, make_eps<T>(static_cast<EpsMode>(eps_mode), eps),
        out1.result<T>(rows)};
    with_rule(static_cast<Mode>(mode), rule.zero,
              [&](auto mode_c, auto zero_c) { run<mode_c(), zero_c()>(p, m, out2.result<T>(cols)); });
  };
  boxes1.scalar_type() == ScalarType::Double ? typed(double{}) : typed(float{});
  return {out1.values, out1.indices, out2.values, out2.indices};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("box_iou_max", TORCH_BOX(&box_iou_max)); }

}  // namespace
}  // namespace ssod
