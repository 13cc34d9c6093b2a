// Which boxes meet which: one group per batch item or image, in positions of the flattened sets.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace ssod {

struct BoxGroup {
  int64_t row0, rows;  // boxes1[row0 .. row0 + rows)
  int64_t col0, cols;  // boxes2[col0 .. col0 + cols)
};

using BoxGroups = std::vector<BoxGroup>;

// Groups of [..., N, 4] x [..., M, 4]. `rows` and `cols` count the boxes of all batch items.
inline BoxGroups dense_groups(const torch::stable::Tensor& boxes1, const torch::stable::Tensor& boxes2, int64_t rows,
                              int64_t cols) {
  const int64_t n = boxes1.size(boxes1.dim() - 2), m = boxes2.size(boxes2.dim() - 2);
  const int64_t batch = n > 0 ? rows / n : (m > 0 ? cols / m : 0);
  BoxGroups groups;
  groups.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    groups.push_back({b * n, n, b * m, m});
  }
  return groups;
}

// Groups of ragged sets. Bounds are clamped and made to rise; rows that no image owns form groups without columns.
inline BoxGroups ragged_groups(const torch::stable::Tensor& offsets1, const torch::stable::Tensor& offsets2,
                               int64_t rows, int64_t cols) {
  const auto* o1 = static_cast<const int64_t*>(offsets1.data_ptr());
  const auto* o2 = static_cast<const int64_t*>(offsets2.data_ptr());
  int64_t row = std::clamp<int64_t>(o1[0], 0, rows), col = std::clamp<int64_t>(o2[0], 0, cols);
  BoxGroups groups{{0, row, 0, 0}};
  for (int64_t b = 1; b < offsets1.size(0); ++b) {
    const int64_t next_row = std::clamp(o1[b], row, rows), next_col = std::clamp(o2[b], col, cols);
    groups.push_back({row, next_row - row, col, next_col - col});
    row = next_row;
    col = next_col;
  }
  groups.push_back({row, rows - row, 0, 0});
  return groups;
}

inline BoxGroups make_groups(const torch::stable::Tensor& boxes1, const torch::stable::Tensor& boxes2,
                             const std::optional<torch::stable::Tensor>& offsets1,
                             const std::optional<torch::stable::Tensor>& offsets2, int64_t rows, int64_t cols) {
  return offsets1 ? ragged_groups(*offsets1, *offsets2, rows, cols) : dense_groups(boxes1, boxes2, rows, cols);
}

// Calls f(group, first_row, count) for the parts of rows [begin, end), at most `tile` rows of one group at a time.
template <typename F>
void for_each_tile(const BoxGroups& groups, int64_t begin, int64_t end, int64_t tile, const F& f) {
  auto group =
      std::partition_point(groups.begin(), groups.end(), [&](const BoxGroup& g) { return g.row0 + g.rows <= begin; });
  for (int64_t row = begin; row < end; ++group) {
    const int64_t last = std::min(end, group->row0 + group->rows);
    for (; row < last; row += tile) {
      f(*group, row, std::min(tile, last - row));
    }
    row = std::min(row, last);
  }
}

inline int64_t mean_columns(const BoxGroups& groups, int64_t rows) {
  int64_t pairs = 0;
  for (const BoxGroup& g : groups) {
    pairs += g.rows * g.cols;
  }
  return rows > 0 ? pairs / rows : 0;
}

}  // namespace ssod
