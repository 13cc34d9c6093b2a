// A tile of deformable attention: the samples of one head for a few queries, as arrays that loops vectorise over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/deform_problem.h"
#include "cpu/deform_rows.h"
#include "cpu/simd.h"
#include "exp_log.h"

namespace ssod {

constexpr int64_t kTileSamples = 256;  // all arrays of a tile together fill half of a 48 KiB L1

// Whole vectors of queries where they fit.
inline int64_t tile_queries(const DeformProblem& p) {
  const int64_t fitting = kTileSamples / std::max<int64_t>(1, p.samples);
  const int64_t rounded = fitting > 16 ? fitting / 16 * 16 : fitting;
  return std::clamp<int64_t>(rounded, 1, std::max<int64_t>(1, p.queries));
}

// Tables per sample of a whole tile: the K samples of a query, repeated for each of its queries.
template <typename T, typename I>
struct TileLevels {
  std::vector<I> start, height, width;
  std::vector<T> share;         // of a reference box
  std::vector<int32_t> column;  // of the reference points
};

template <typename T, typename I>
TileLevels<T, I> make_tile_levels(const DeformProblem& p) {
  TileLevels<T, I> out;
  for (int64_t query = 0; query < tile_queries(p); ++query) {
    for (size_t l = 0; l < p.levels.size(); ++l) {
      const auto& [level, points] = p.levels[l];
      out.start.insert(out.start.end(), points, static_cast<I>(level.start));
      out.height.insert(out.height.end(), points, static_cast<I>(level.height));
      out.width.insert(out.width.end(), points, static_cast<I>(level.width));
      out.share.insert(out.share.end(), points, offset_share<T>(p.offset_scale, points));
      out.column.insert(out.column.end(), points, p.reference.levels == 1 ? 0 : static_cast<int32_t>(l));
    }
  }
  return out;
}

// Numbers of `rows` rows, `count` of each.
template <typename G, typename T>
SSOD_CLONES static void read_rows(const G* from, int64_t stride, int64_t rows, int64_t count, T* __restrict to) {
  for (int64_t r = 0; r < rows; ++r) {
    const G* __restrict row = from + r * stride;
    for (int64_t k = 0; k < count; ++k) {
      to[r * count + k] = widen(row[k]);
    }
  }
}

// Pairs (x, y) of `rows` rows, `count` of each, as two arrays.
template <typename G, typename T>
SSOD_CLONES static void read_pairs(const G* from, int64_t stride, int64_t rows, int64_t count, T* __restrict x,
                                   T* __restrict y) {
  for (int64_t r = 0; r < rows; ++r) {
    const G* __restrict row = from + r * stride;
    for (int64_t k = 0; k < count; ++k) {
      x[r * count + k] = widen(row[2 * k]);
      y[r * count + k] = widen(row[2 * k + 1]);
    }
  }
}

// One of the numbers of the reference of each sample. `column` has the references of the samples of one query.
template <typename T>
SSOD_CLONES static void read_reference(const T* from, int64_t stride, int64_t numbers, int64_t rows, int64_t count,
                                       const int32_t* __restrict column, T* __restrict to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = from + r * stride;
    for (int64_t k = 0; k < count; ++k) {
      to[r * count + k] = row[column[k] * numbers];
    }
  }
}

template <typename T, typename I>
SSOD_CLONES static void location_positions(const T* __restrict location, const I* __restrict size, int64_t n,
                                           T* __restrict position) {
  for (int64_t i = 0; i < n; ++i) {
    position[i] = pixel_position(location[i], static_cast<T>(size[i]));
  }
}

template <typename T, typename I>
SSOD_CLONES static void point_positions(const T* __restrict reference, const T* __restrict offset,
                                        const I* __restrict size, int64_t n, T* __restrict position) {
  for (int64_t i = 0; i < n; ++i) {
    position[i] = point_position(reference[i], offset[i], static_cast<T>(size[i]));
  }
}

template <typename T, typename I>
SSOD_CLONES static void box_positions(const T* __restrict reference, const T* __restrict side,
                                      const T* __restrict share, const T* __restrict offset, const I* __restrict size,
                                      int64_t n, T* __restrict scale, T* __restrict position) {
  for (int64_t i = 0; i < n; ++i) {
    const T pixels = static_cast<T>(size[i]);
    scale[i] = box_offset_scale(share[i], side[i], pixels);
    position[i] = box_position(reference[i], offset[i], scale[i], pixels);
  }
}

// Where the arrays of footprints go.
template <typename T, typename I>
struct FootprintArrays {
  I* row;
  T *fx, *fy;
  int32_t* inside;
};

template <bool guarded, typename T, typename I>
SSOD_CLONES static void bilinear_footprints(const T* __restrict px, const T* __restrict py, const I* __restrict start,
                                            const I* __restrict height, const I* __restrict width, I tokens, int64_t n,
                                            const FootprintArrays<T, I> out) {
  I* __restrict row = out.row;
  T* __restrict fx = out.fx, * __restrict fy = out.fy;
  int32_t* __restrict inside = out.inside;
  for (int64_t i = 0; i < n; ++i) {
    const PyramidLevel<I> level{start[i], height[i], width[i]};
    const Footprint<T, I> f = bilinear_footprint<guarded>(px[i], py[i], level, tokens);
    row[i] = f.row, fx[i] = f.fx, fy[i] = f.fy, inside[i] = f.inside;
  }
}

template <typename T, typename I>
SSOD_CLONES static void discrete_footprints(const T* __restrict x, const T* __restrict y, const I* __restrict start,
                                            const I* __restrict height, const I* __restrict width, I tokens, int64_t n,
                                            const FootprintArrays<T, I> out) {
  for (int64_t i = 0; i < n; ++i) {
    const PyramidLevel<I> level{start[i], height[i], width[i]};
    const Footprint<T, I> f = discrete_footprint(x[i], y[i], level, tokens);
    out.row[i] = f.row, out.fx[i] = f.fx, out.fy[i] = f.fy, out.inside[i] = f.inside;
  }
}

// shares [n, 4]
template <typename T>
SSOD_CLONES static void sample_shares(const T* __restrict fx, const T* __restrict fy, const T* __restrict weight,
                                      int64_t n, T* __restrict shares) {
  for (int64_t i = 0; i < n; ++i) {
    const CornerShares<T> s = corner_shares(fx[i], fy[i], weight[i]);
    shares[4 * i] = s.w00, shares[4 * i + 1] = s.w01, shares[4 * i + 2] = s.w10, shares[4 * i + 3] = s.w11;
  }
}

// Where the upper and the lower two corners of samples begin, in rows that lie `stride` numbers apart. Samples that are
// not live have any offset.
template <typename I>
SSOD_CLONES static void row_offsets(const I* __restrict row, const I* __restrict width, int64_t stride, int64_t n,
                                    int64_t* __restrict above, int64_t* __restrict below) {
  const uint64_t step = static_cast<uint64_t>(stride);
  for (int64_t i = 0; i < n; ++i) {
    above[i] = static_cast<int64_t>(static_cast<uint64_t>(row[i]) * step);
    below[i] = static_cast<int64_t>((static_cast<uint64_t>(row[i]) + static_cast<uint64_t>(width[i])) * step);
  }
}

template <typename T>
SSOD_HD void transpose(const T* __restrict from, int64_t rows, int64_t columns, T* __restrict to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      to[c * rows + r] = from[r * columns + c];
    }
  }
}

// Softmax of each row of logits [rows, count] in place, and its log-sum-exp; `columns` [count, rows], `maximum` and
// `sum` are scratch. Rows are lanes: a running maximum along a row would not vectorise.
template <typename T>
SSOD_CLONES static void softmax_rows(T* __restrict logits, int64_t rows, int64_t count, T* __restrict columns,
                                     T* __restrict maximum, T* __restrict sum, T* __restrict lse) {
  std::fill_n(maximum, rows, minus_infinity<T>());
  std::fill_n(sum, rows, T(0));
  transpose(logits, rows, count, columns);
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      maximum[r] = logit_maximum(maximum[r], columns[k * rows + r]);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      columns[k * rows + r] = fast_exp(columns[k * rows + r] - softmax_shift(maximum[r]));
      sum[r] += columns[k * rows + r];
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t r = 0; r < rows; ++r) {
      columns[k * rows + r] /= sum[r];
    }
  }
  transpose(columns, count, rows, logits);
  for (int64_t r = 0; r < rows; ++r) {
    lse[r] = log_sum_exp(maximum[r], fast_log(sum[r]));
  }
}

// Softmax of logits whose log-sum-exp is known.
template <typename T>
SSOD_CLONES static void exponentials(T* __restrict logits, int64_t rows, int64_t count, const T* lse, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T known = lse[r * stride];
    for (int64_t k = 0; k < count; ++k) {
      logits[r * count + k] = fast_exp(logits[r * count + k] - known);
    }
  }
}

// Which queries of which head a tile covers.
struct TileRange {
  int64_t image, head, query, count;
};

// Arrays of n = count * K samples, query by query.
template <typename T, typename I>
class DeformTile {
 public:
  static constexpr bool kGuarded = !std::is_same_v<I, int32_t>;

  DeformTile(const DeformProblem& problem, const TileLevels<T, I>& levels)
      : levels(levels), p_(problem), capacity_(tile_queries(problem) * problem.samples) {
    numbers_.resize((kArrays + 4) * capacity_ + 2 * tile_queries(problem));
    row_.resize(capacity_);
    offsets_.resize(2 * (capacity_ + kLookahead));
    inside_.resize(capacity_);
    T* next = numbers_.data();
    for (T** array : {&x, &y, &px, &py, &weight, &fx, &fy, &ref_x, &ref_y, &ref_w, &ref_h, &scale_x, &scale_y}) {
      *array = next;
      next += capacity_;
    }
    shares = next;
    maximum_ = next + 4 * capacity_;
    sum_ = maximum_ + tile_queries(problem);
    row = row_.data();
    inside = inside_.data();
  }

  // Footprints of the samples of the tile. Weights are read apart.
  void locate(const TileRange& at) {
    range = at;
    n = at.count * p_.samples;
    const int64_t first = at.image * p_.queries + at.query, column = at.head * p_.samples * 2;
    with_numbers<T>(p_.positions.data, p_.positions.dtype, [&](const auto* data) {
      read_pairs(data + first * p_.positions.stride + column, p_.positions.stride, at.count, p_.samples, x, y);
    });
    const I tokens = static_cast<I>(p_.tokens);
    const FootprintArrays<T, I> out{row, fx, fy, inside};
    const I *start = levels.start.data(), *height = levels.height.data(), *width = levels.width.data();
    if (p_.discrete) {
      return discrete_footprints(x, y, start, height, width, tokens, n, out);
    }
    p_.fused() ? place_around_references(first) : place_at_locations();
    bilinear_footprints<kGuarded>(px, py, start, height, width, tokens, n, out);
  }

  // Weights as they are, or logits.
  void read_weights() {
    const int64_t first = range.image * p_.queries + range.query, column = range.head * p_.samples;
    with_numbers<T>(p_.weights.data, p_.weights.dtype, [&](const auto* data) {
      read_rows(data + first * p_.weights.stride + column, p_.weights.stride, range.count, p_.samples, weight);
    });
  }

  // Turns logits into weights; lse [count]. The shares are not there yet: they serve as scratch.
  void softmax(T* lse) { softmax_rows(weight, range.count, p_.samples, shares, maximum_, sum_, lse); }

  void softmax_of(const T* lse, int64_t stride) { exponentials(weight, range.count, p_.samples, lse, stride); }

  void share_weights() { sample_shares(fx, fy, weight, n, shares); }

  // The samples in rows that lie `stride` numbers apart.
  SampleView<T> view(int64_t stride) {
    int64_t *above = offsets_.data(), *below = above + capacity_ + kLookahead;
    row_offsets(row, levels.width.data(), stride, n, above, below);
    return {above, below, inside, shares};
  }

  const TileLevels<T, I>& levels;
  TileRange range{};
  int64_t n = 0;
  I* row;
  int32_t* inside;
  T *x, *y;    // locations or offsets
  T *px, *py;  // pixels
  T *weight, *fx, *fy;
  T* shares;  // [n, 4]
  T *ref_x, *ref_y, *ref_w, *ref_h;
  T *scale_x, *scale_y;  // pixels per unit of offset, for reference boxes

 private:
  static constexpr int64_t kArrays = 13;

  void place_at_locations() {
    location_positions(x, levels.width.data(), n, px);
    location_positions(y, levels.height.data(), n, py);
  }

  void place_around_references(int64_t first) {
    const auto [data, of_query, numbers] = p_.reference;
    const T* points = static_cast<const T*>(data) + first * of_query * numbers;
    T* arrays[] = {ref_x, ref_y, ref_w, ref_h};
    for (int64_t i = 0; i < numbers; ++i) {
      read_reference(points + i, of_query * numbers, numbers, range.count, p_.samples, levels.column.data(), arrays[i]);
    }
    const I *width = levels.width.data(), *height = levels.height.data();
    if (numbers == 2) {
      point_positions(ref_x, x, width, n, px);
      point_positions(ref_y, y, height, n, py);
    } else {
      box_positions(ref_x, ref_w, levels.share.data(), x, width, n, scale_x, px);
      box_positions(ref_y, ref_h, levels.share.data(), y, height, n, scale_y, py);
    }
  }

  const DeformProblem& p_;
  int64_t capacity_;
  std::vector<T> numbers_;
  std::vector<I> row_;
  std::vector<int32_t> inside_;
  std::vector<int64_t> offsets_;
  T *maximum_, *sum_;
};

}  // namespace ssod
