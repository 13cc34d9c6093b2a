// Transposes in blocks of 8 x 8, which stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/wide.h"

namespace ssod {

constexpr int64_t kSquare = 8;

template <typename T>
SSOD_HD void transpose_edge(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      out[j * out_stride + i] = in[i * in_stride + j];
    }
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SSOD_HAS_SHUFFLE
#endif
#endif

// One full block. Three rounds of interleaving row i with row i + 4 move every entry to its place.
template <typename T>
SSOD_HD void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
#ifdef SSOD_HAS_SHUFFLE
  typedef T Row __attribute__((vector_size(kSquare * sizeof(T))));
  Row rows[kSquare], mixed[kSquare];
  for (int64_t i = 0; i < kSquare; ++i) {
    load(in + i * in_stride, rows[i]);
  }
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < kSquare / 2; ++i) {
      mixed[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int64_t i = 0; i < kSquare; ++i) {
      rows[i] = mixed[i];
    }
  }
  for (int64_t i = 0; i < kSquare; ++i) {
    store(out + i * out_stride, rows[i]);
  }
#else
  transpose_edge(in, in_stride, kSquare, kSquare, out, out_stride);
#endif
}

// in [rows, columns] to out [columns, rows].
template <typename T>
SSOD_CLONES static void transpose_matrix(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                                         int64_t out_stride) {
  for (int64_t j = 0; j < columns; j += kSquare) {
    for (int64_t i = 0; i < rows; i += kSquare) {
      const T* from = in + i * in_stride + j;
      T* to = out + j * out_stride + i;
      if (i + kSquare <= rows && j + kSquare <= columns) {
        transpose_square(from, in_stride, to, out_stride);
      } else {
        transpose_edge(from, in_stride, std::min(kSquare, rows - i), std::min(kSquare, columns - j), to, out_stride);
      }
    }
  }
}

}  // namespace ssod
