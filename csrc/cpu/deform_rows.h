// Inner loops of deformable attention over the channels of the pixels that samples read.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/halves.h"
#include "cpu/simd.h"
#include "ms_deform_attn.h"

namespace ssod {

// Samples of a tile as these loops read them. The corners of sample i lie at above[i] and below[i] numbers from row 0,
// and one row behind each; corner c counts, by its share in shares [n, 4], if bit c of inside[i] is set. Behind the
// last sample there are kLookahead more offsets, of anything.
template <typename T>
struct SampleView {
  const int64_t *above, *below;
  const int32_t* inside;
  const T* shares;
};

constexpr int32_t kAllInside = 15;

// Samples between the request for pixels and their use. Pixels of the few queries of a decoder lie far apart, in no
// order that hardware would foresee.
constexpr int64_t kLookahead = 8;

// Requests the corners of sample i, `bytes` of each. Of a sample that is not live they may lie anywhere.
template <int64_t bytes, typename V, typename T>
SSOD_HD void request_corners(const V* value, int64_t stride, const SampleView<T>& s, int64_t i) {
  const uintptr_t above = reinterpret_cast<uintptr_t>(value) + s.above[i] * sizeof(V);
  const uintptr_t below = reinterpret_cast<uintptr_t>(value) + s.below[i] * sizeof(V);
  for (uintptr_t corner : {above, above + stride * sizeof(V), below, below + stride * sizeof(V)}) {
    for (int64_t line = 0; line < bytes; line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(corner + line));
    }
  }
}

// Calls f(columns, vectors, lanes), with the last two as compile-time constants, for blocks that cover the channels: as
// wide as registers are, then narrower ones for the rest.
template <typename T, typename F>
SSOD_HD void for_each_block(int64_t channels, F&& f) {
  constexpr int kWide = 64 / sizeof(T);
  using std::integral_constant;
  int64_t c = 0;
  for (; channels - c >= 4 * kWide; c += 4 * kWide) {
    f(c, integral_constant<int, 4>{}, integral_constant<int, kWide>{});
  }
  if (channels - c >= 2 * kWide) {
    f(c, integral_constant<int, 2>{}, integral_constant<int, kWide>{});
    c += 2 * kWide;
  }
  if (channels - c >= kWide) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, kWide>{});
    c += kWide;
  }
  for (; channels - c >= 4; c += 4) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, 4>{});
  }
  for (; c < channels; ++c) {
    f(c, integral_constant<int, 1>{}, integral_constant<int, 1>{});
  }
}

// Sum over samples [first, last) of kVectors * kLanes channels; `value` points at the first of them in row 0.
template <int kVectors, int kLanes, typename V, typename T>
SSOD_HD void sum_block(const V* value, int64_t stride, const SampleView<T>& s, int64_t first, int64_t last, T* out) {
  using Vector = typename Lanes<T, kLanes>::type;
  Vector total[kVectors] = {};
  for (int64_t i = first; i < last; ++i) {
    request_corners<kVectors * kLanes * sizeof(V)>(value, stride, s, i + kLookahead);
    const V *above = value + s.above[i], *below = value + s.below[i];
    const T* shares = s.shares + 4 * i;
    if (s.inside[i] == kAllInside) {
      for (int v = 0; v < kVectors; ++v) {
        Vector v00, v01, v10, v11;
        load_lanes<kLanes>(above + v * kLanes, v00);
        load_lanes<kLanes>(above + stride + v * kLanes, v01);
        load_lanes<kLanes>(below + v * kLanes, v10);
        load_lanes<kLanes>(below + stride + v * kLanes, v11);
        total[v] += (shares[0] * v00 + shares[1] * v01) + (shares[2] * v10 + shares[3] * v11);
      }
      continue;
    }
    const V* corners[] = {above, above + stride, below, below + stride};
    for (int c = 0; c < 4; ++c) {
      for (int v = 0; v < kVectors && (s.inside[i] >> c & 1); ++v) {
        Vector pixel;
        load_lanes<kLanes>(corners[c] + v * kLanes, pixel);
        total[v] += shares[c] * pixel;
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    std::memcpy(out + v * kLanes, &total[v], sizeof(Vector));
  }
}

template <typename V, typename T>
struct BlockSum {
  const V* value;
  int64_t stride;
  const SampleView<T>& samples;
  int64_t first, last;
  T* out;

  template <typename Vectors, typename Width>
  SSOD_HD void operator()(int64_t c, Vectors, Width) const {
    sum_block<Vectors::value, Width::value>(value + c, stride, samples, first, last, out + c);
  }
};

// out[q] = sum over the `count` samples of query q; rows of `channels` numbers, out_stride apart.
template <typename V, typename T>
SSOD_CLONES static void sum_samples(const V* value, int64_t stride, int64_t channels, const SampleView<T> samples,
                                    int64_t queries, int64_t count, T* out, int64_t out_stride) {
  for (int64_t q = 0; q < queries; ++q) {
    for_each_block<T>(channels,
                      BlockSum<V, T>{value, stride, samples, q * count, (q + 1) * count, out + q * out_stride});
  }
}

// Sums of the lanes of four vectors.
template <int kLanes, typename T>
SSOD_HD void sums_of_lanes(const typename Lanes<T, kLanes>::type* v, T* sums) {
  if constexpr (kLanes == 1) {
    std::memcpy(sums, v, 4 * sizeof(T));
  } else if constexpr (kLanes == 4) {
    using Four = typename Lanes<T, 4>::type;
    const Four ab = __builtin_shufflevector(v[0], v[1], 0, 1, 4, 5) + __builtin_shufflevector(v[0], v[1], 2, 3, 6, 7);
    const Four cd = __builtin_shufflevector(v[2], v[3], 0, 1, 4, 5) + __builtin_shufflevector(v[2], v[3], 2, 3, 6, 7);
    const Four total = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
    std::memcpy(sums, &total, sizeof(total));
  } else {
    typename Lanes<T, kLanes / 2>::type halves[4];
    for (int c = 0; c < 4; ++c) {
      typename Lanes<T, kLanes / 2>::type low, high;
      std::memcpy(&low, &v[c], sizeof(low));
      std::memcpy(&high, reinterpret_cast<const char*>(&v[c]) + sizeof(low), sizeof(high));
      halves[c] = low + high;
    }
    sums_of_lanes<kLanes / 2, T>(halves, sums);
  }
}

template <int kLanes, typename V, typename Vector>
SSOD_HD void add_product(const Vector& a, const V* b, Vector& sum) {
  Vector other;
  load_lanes<kLanes>(b, other);
  sum += a * other;
}

// Adds to dots [n, 4] the products of `grad` with the corners of samples [first, last), over kVectors * kLanes
// channels.
template <int kVectors, int kLanes, typename V, typename T>
SSOD_HD void dot_block(const V* value, int64_t stride, const SampleView<T>& s, int64_t first, int64_t last,
                       const T* grad, T* dots) {
  using Vector = typename Lanes<T, kLanes>::type;
  Vector g[kVectors];
  std::memcpy(g, grad, sizeof(g));
  for (int64_t i = first; i < last; ++i) {
    request_corners<kVectors * kLanes * sizeof(V)>(value, stride, s, i + kLookahead);
    const V *above = value + s.above[i], *below = value + s.below[i];
    Vector products[4] = {};
    if (s.inside[i] == kAllInside) {
      for (int v = 0; v < kVectors; ++v) {
        add_product<kLanes>(g[v], above + v * kLanes, products[0]);
        add_product<kLanes>(g[v], above + stride + v * kLanes, products[1]);
        add_product<kLanes>(g[v], below + v * kLanes, products[2]);
        add_product<kLanes>(g[v], below + stride + v * kLanes, products[3]);
      }
    } else {
      const V* corners[] = {above, above + stride, below, below + stride};
      for (int c = 0; c < 4; ++c) {
        for (int v = 0; v < kVectors && (s.inside[i] >> c & 1); ++v) {
          add_product<kLanes>(g[v], corners[c] + v * kLanes, products[c]);
        }
      }
    }
    T sums[4];
    sums_of_lanes<kLanes, T>(products, sums);
    for (int c = 0; c < 4; ++c) {
      dots[4 * i + c] += sums[c];
    }
  }
}

template <typename V, typename T>
struct BlockDots {
  const V* value;
  int64_t stride;
  const SampleView<T>& samples;
  int64_t first, last;
  const T* grad;
  T* dots;

  template <typename Vectors, typename Width>
  SSOD_HD void operator()(int64_t c, Vectors, Width) const {
    dot_block<Vectors::value, Width::value>(value + c, stride, samples, first, last, grad + c, dots);
  }
};

// dots[i] = products of the gradient of sample i's query with its four corners, 0 for a corner that does not count.
template <typename V, typename T>
SSOD_CLONES static void dot_samples(const V* value, int64_t stride, int64_t channels, const SampleView<T> samples,
                                    int64_t queries, int64_t count, const T* grad, int64_t grad_stride, T* dots) {
  std::memset(dots, 0, 4 * queries * count * sizeof(T));
  for (int64_t q = 0; q < queries; ++q) {
    for_each_block<T>(
        channels, BlockDots<V, T>{value, stride, samples, q * count, (q + 1) * count, grad + q * grad_stride, dots});
  }
}

template <int kLanes, typename Vector, typename T>
SSOD_HD void add_scaled(const Vector& grad, T share, T* to) {
  Vector sum;
  std::memcpy(&sum, to, sizeof(sum));
  sum += share * grad;
  std::memcpy(to, &sum, sizeof(sum));
}

// Adds the shares of `grad` to the corners of samples [first, last), over kVectors * kLanes channels.
template <int kVectors, int kLanes, typename T>
SSOD_HD void scatter_block(T* value, int64_t stride, const SampleView<T>& s, int64_t first, int64_t last,
                           const T* grad) {
  using Vector = typename Lanes<T, kLanes>::type;
  Vector g[kVectors];
  std::memcpy(g, grad, sizeof(g));
  for (int64_t i = first; i < last; ++i) {
    T *above = value + s.above[i], *below = value + s.below[i];
    T* corners[] = {above, above + stride, below, below + stride};
    for (int c = 0; c < 4; ++c) {
      for (int v = 0; v < kVectors && (s.inside[i] >> c & 1); ++v) {
        add_scaled<kLanes>(g[v], s.shares[4 * i + c], corners[c] + v * kLanes);
      }
    }
  }
}

template <typename T>
struct BlockScatter {
  T* value;
  int64_t stride;
  const SampleView<T>& samples;
  int64_t first, last;
  const T* grad;

  template <typename Vectors, typename Width>
  SSOD_HD void operator()(int64_t c, Vectors, Width) const {
    scatter_block<Vectors::value, Width::value>(value + c, stride, samples, first, last, grad + c);
  }
};

// Adds the gradients of all queries to the pixels that their samples read.
template <typename T>
SSOD_CLONES static void scatter_samples(T* value, int64_t stride, int64_t channels, const SampleView<T> samples,
                                        int64_t queries, int64_t count, const T* grad, int64_t grad_stride) {
  for (int64_t q = 0; q < queries; ++q) {
    for_each_block<T>(channels,
                      BlockScatter<T>{value, stride, samples, q * count, (q + 1) * count, grad + q * grad_stride});
  }
}

}  // namespace ssod
