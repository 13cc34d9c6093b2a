// Boxes [n, 4] to four planes and back, and walks along strided rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "rows.h"

namespace ssod {

constexpr int64_t kBoxTile = 128;  // boxes: a few tiles of planes stay in L1

// Four numbers per box, as planes.
template <typename T>
struct Quads {
  alignas(64) T a[kBoxTile], b[kBoxTile], c[kBoxTile], d[kBoxTile];
};

template <typename T>
SSOD_CLONES static void split_quads(const T* __restrict rows, Quads<T>& out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out.a[i] = rows[4 * i];
    out.b[i] = rows[4 * i + 1];
    out.c[i] = rows[4 * i + 2];
    out.d[i] = rows[4 * i + 3];
  }
}

template <typename T>
SSOD_CLONES static void join_quads(const Quads<T>& in, T* __restrict rows, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    rows[4 * i] = in.a[i];
    rows[4 * i + 1] = in.b[i];
    rows[4 * i + 2] = in.c[i];
    rows[4 * i + 3] = in.d[i];
  }
}

// Calls f(position, row, stride, count) for the runs of equal stride in rows [first, first + n): one division per run,
// not per row.
template <typename F>
void for_each_run(const Rows& rows, int64_t first, int64_t n, const F& f) {
  const int64_t period = rows.dims == 1 ? rows.count : rows.size[0];
  for (int64_t i = 0; i < n;) {
    const int64_t within = (first + i) % period, count = std::min(n - i, period - within);
    f(i, rows.offset(first + i), rows.stride[0], count);
    i += count;
  }
}

// Rows [first, first + n) of a tensor [..., 4] as planes.
template <typename T>
void load_quads(const T* data, const Rows& rows, int64_t first, int64_t n, Quads<T>& out) {
  if (rows.dense(4)) {
    split_quads(data + 4 * first, out, n);
    return;
  }
  for_each_run(rows, first, n, [&](int64_t position, int64_t row, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i, row += stride) {
      out.a[position + i] = data[row];
      out.b[position + i] = data[row + 1];
      out.c[position + i] = data[row + 2];
      out.d[position + i] = data[row + 3];
    }
  });
}

}  // namespace ssod
