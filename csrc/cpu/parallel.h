// The split of rows over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace ssod {

// Calls f(begin, end) on parts of [0, rows), in parallel once there is work for more than one thread.
template <typename F>
void parallel_rows(int64_t rows, int64_t work_per_row, const F& f) {
  constexpr int64_t kWorkPerTask = 32768;
  const int64_t grain = std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, work_per_row));
  if (rows <= grain) {
    f(int64_t{0}, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, f);
  }
}

}  // namespace ssod
