// Vectorised loops that turn dot products of deformable attention into the gradients of what samples were made of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/halves.h"
#include "cpu/simd.h"
#include "ms_deform_attn.h"

namespace ssod {

// Gradients of positions in pixels and of weights, from dots [n, 4].
template <typename T>
SSOD_CLONES static void sample_gradients(const T* __restrict dots, const T* __restrict fx, const T* __restrict fy,
                                         const T* __restrict weight, const int32_t* __restrict inside, int64_t n,
                                         T* __restrict px, T* __restrict py, T* __restrict of_weight) {
  for (int64_t i = 0; i < n; ++i) {
    const SampleGradient<T> g = sample_gradient(dots[4 * i], dots[4 * i + 1], dots[4 * i + 2], dots[4 * i + 3], fx[i],
                                                fy[i], weight[i], inside[i] != 0);
    px[i] = g.px, py[i] = g.py, of_weight[i] = g.weight;
  }
}

// grad *= factor in the sense of chained().
template <typename T, typename F>
SSOD_CLONES static void chain_row(T* __restrict grad, const F* __restrict factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = chained(grad[i], static_cast<T>(factor[i]));
  }
}

// out = grad * factor in the sense of chained().
template <typename T, typename F>
SSOD_CLONES static void chain_row(const T* __restrict grad, const F* __restrict factor, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = chained(grad[i], static_cast<T>(factor[i]));
  }
}

// Gradients of the side of the reference box of each sample.
template <typename T, typename I>
SSOD_CLONES static void chain_side(const T* __restrict grad, const T* __restrict share, const T* __restrict offset,
                                   const I* __restrict size, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = chained(grad[i], box_side_factor(share[i], offset[i], static_cast<T>(size[i])));
  }
}

// Adds grad [rows, count] to the numbers of the references that the samples of a query share.
template <typename T>
SSOD_CLONES static void add_to_references(const T* __restrict grad, int64_t rows, int64_t count,
                                          const int32_t* __restrict column, int64_t numbers, int64_t stride, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < count; ++k) {
      to[r * stride + column[k] * numbers] += grad[r * count + k];
    }
  }
}

// Gradients of logits, in place of those of their softmax.
template <typename T>
SSOD_CLONES static void softmax_gradients(const T* __restrict weight, int64_t rows, int64_t count, T* __restrict grad) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict a = weight + r * count;
    T* __restrict g = grad + r * count;
    T mean = 0;
    for (int64_t k = 0; k < count; ++k) {
      mean += a[k] * g[k];
    }
    for (int64_t k = 0; k < count; ++k) {
      g[k] = a[k] * (g[k] - mean);
    }
  }
}

// Rows of `count` numbers, `stride` apart.
template <typename T, typename G>
SSOD_CLONES static void store_rows(const T* __restrict from, int64_t rows, int64_t count, G* __restrict to,
                                   int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < count; ++k) {
      narrow(from[r * count + k], to + r * stride + k);
    }
  }
}

// Rows of `count` pairs (x, y), `stride` apart.
template <typename T, typename G>
SSOD_CLONES static void store_pairs(const T* __restrict x, const T* __restrict y, int64_t rows, int64_t count,
                                    G* __restrict to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < count; ++k) {
      narrow(x[r * count + k], to + r * stride + 2 * k);
      narrow(y[r * count + k], to + r * stride + 2 * k + 1);
    }
  }
}

// to [n] = sum over `parts` arrays that lie n apart.
template <typename T>
SSOD_CLONES static void sum_parts(const T* __restrict parts, int64_t count, int64_t part_stride, int64_t n,
                                  T* __restrict to) {
  std::fill_n(to, n, T(0));
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] += parts[part * part_stride + i];
    }
  }
}

}  // namespace ssod
