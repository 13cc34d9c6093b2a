// Thresholds from mixtures of two Gaussians: one E-step is one vectorised pass over the samples.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "gmm.h"

namespace ssod {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kBlocksPerLog = 96;  // factors up to 2 in each of 8 lanes: the product stays below 2^768

using Vec = double __attribute__((vector_size(kLanes * sizeof(double))));
using IntVec = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));

SSOD_HD void broadcast(double x, Vec& out) { out = Vec{x, x, x, x, x, x, x, x}; }

SSOD_HD double sum(const Vec& v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

SSOD_HD double product(const Vec& v) { return ((v[0] * v[4]) * (v[1] * v[5])) * ((v[2] * v[6]) * (v[3] * v[7])); }

// exp(-x) for x >= 0 to about 2e-16; below 1e-304 it stays there. NaN counts as large.
SSOD_HD void exp_of_minus(const Vec& x, Vec& out) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the lowest bits
  const Vec a = x < 700.0 ? -x : Vec{} - 700.0;
  const Vec shifted = a * 1.4426950408889634074 + kMagic;
  const Vec whole = shifted - kMagic;
  const Vec r = (a - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  Vec p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.0;
  out = p * (Vec)(((IntVec)shifted + 1023) << 52);
}

// Log of both weighted densities for a block of samples.
struct Joint {
  Vec a, b;           // distances from the means
  Vec first, second;  // logs
  Vec top;            // the larger of both
  IntVec prefers;     // all bits set where the second is larger
  Vec e;              // exp(-|difference|)

  SSOD_HD void evaluate(const Vec& y, const GmmDensity& density) {
    a = y - density.mean[0];
    b = y - density.mean[1];
    first = density.constant[0] - density.scale[0] * (a * a);
    second = density.constant[1] - density.scale[1] * (b * b);
    prefers = second > first;
    top = prefers ? second : first;
    exp_of_minus(top - (prefers ? first : second), e);
  }
};

struct BlockSums {
  Vec mass0{}, mass1{}, first0{}, first1{}, second0{}, second1{}, top{}, factors{};
  double logs = 0;

  SSOD_HD BlockSums() { broadcast(1, factors); }

  // `part` is 1 for a sample and 0 for padding.
  SSOD_HD void add(const Joint& j, const Vec& part) {
    const Vec more = part / (1.0 + j.e), less = j.e * more;
    const Vec share0 = j.prefers ? less : more, share1 = j.prefers ? more : less;
    const Vec a = share0 * j.a, b = share1 * j.b;
    mass0 += share0;
    mass1 += share1;
    first0 += a;
    first1 += b;
    second0 += a * j.a;
    second1 += b * j.b;
    top += part * j.top;
    factors *= 1.0 + part * j.e;
  }

  // The sum of log1p(e) is the log of a product: one logarithm for many samples.
  SSOD_HD void fold() {
    logs += std::log(product(factors));
    broadcast(1, factors);
  }

  SSOD_HD GmmSums total() {
    fold();
    return {{sum(mass0), sum(mass1)}, {sum(first0), sum(first1)}, {sum(second0), sum(second1)}, sum(top) + logs};
  }
};

SSOD_HD void load(const double* from, Vec& to) { std::memcpy(&to, from, sizeof(Vec)); }
SSOD_HD void store(const Vec& from, double* to) { std::memcpy(to, &from, sizeof(Vec)); }

// y[0 .. n) with anything finite up to the next multiple of kLanes.
SSOD_HD GmmSums expect(const double* y, int64_t n, const GmmDensity& density) {
  BlockSums sums;
  Joint joint;
  Vec block, part;
  broadcast(1, part);
  int64_t i = 0;
  for (int64_t blocks = 0; i + kLanes <= n; i += kLanes) {
    load(y + i, block);
    joint.evaluate(block, density);
    sums.add(joint, part);
    if (++blocks == kBlocksPerLog) {
      sums.fold();
      blocks = 0;
    }
  }
  if (i < n) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      part[lane] = i + lane < n ? 1 : 0;
    }
    load(y + i, block);
    joint.evaluate(block, density);
    sums.add(joint, part);
  }
  return sums.total();
}

SSOD_CLONES static void fit_samples(const double* y, int64_t n, const GmmOptions& options, GmmFit& fit) {
  while (!fit.converged && fit.iterations < options.max_iter) {
    gmm_advance(fit, expect(y, n, gmm_density(fit)), options);
  }
}

// Of each sample the larger log density, its label (the sign of odds: below 0 is the second component), and e.
SSOD_CLONES static void classify(const double* y, int64_t n, const GmmDensity& density, double* top, double* odds,
                                 double* e) {
  Joint joint;
  Vec block;
  for (int64_t i = 0; i < n; i += kLanes) {
    load(y + i, block);
    joint.evaluate(block, density);
    store(joint.top, top + i);
    store(joint.first - joint.second, odds + i);
    store(joint.e, e + i);
  }
}

// Memory of one thread for one problem.
class Workspace {
 public:
  void reserve(int64_t samples) {
    const int64_t padded = (samples + kLanes - 1) / kLanes * kLanes;
    if (padded > capacity_) {
      capacity_ = padded;
      memory_.reset(new double[5 * padded]);  // not initialised
      double** columns[] = {&x_, &y_, &top_, &odds_, &e_};
      for (int k = 0; k < 5; ++k) {
        *columns[k] = memory_.get() + k * padded;
      }
    }
  }

  // Takes the samples of one problem that count, and says where they lie.
  template <typename T>
  GmmFit take(const T* values, int64_t count, double sign) {
    double least = gmm_infinity(), largest = -gmm_infinity();
    n_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = sign * static_cast<double>(values[i]);
      const bool used = is_finite(x);
      x_[n_] = x;  // without a branch: the next sample overwrites one that takes no part
      n_ += used;
      least = used && x < least ? x : least;
      largest = used && x > largest ? x : largest;
    }
    const GmmFit fit = gmm_start(least, largest, static_cast<double>(n_));
    for (int64_t i = 0; i < n_; ++i) {
      y_[i] = x_[i] - fit.origin;
    }
    for (int64_t i = n_; i % kLanes != 0; ++i) {
      y_[i] = 0;
    }
    return fit;
  }

  void fit(const GmmOptions& options, GmmFit& fit) const { fit_samples(y_, n_, options, fit); }

  double threshold(const GmmFit& fit, GmmRule rule) {
    classify(y_, n_, gmm_density(fit), top_, odds_, e_);
    return rule == GmmRule::density ? densest() : outermost(fit);
  }

 private:
  double densest() const {
    bool first_exists = false;
    for (int64_t i = 0; i < n_ && !first_exists; ++i) {
      first_exists = !(odds_[i] < 0);
    }
    double bound = -gmm_infinity();
    for (int64_t i = 0; i < n_; ++i) {
      const double top = candidate(i, first_exists) ? top_[i] : -gmm_infinity();
      bound = top > bound ? top : bound;
    }
    bound -= 1e-9 * (1 + std::fabs(bound));
    GmmCandidate best = no_candidate();
    for (int64_t i = 0; i < n_; ++i) {
      if (candidate(i, first_exists) && !(top_[i] + e_[i] < bound)) {  // log1p(e) is at most e
        const double density = top_[i] + std::log1p(e_[i]);
        best = better(best, {density == density ? density : -gmm_infinity(), x_[i]});
      }
    }
    return best.x;
  }

  bool candidate(int64_t i, bool first) const { return (odds_[i] < 0) != first; }

  double outermost(const GmmFit& fit) const {
    double largest = -gmm_infinity();
    for (int64_t i = 0; i < n_; ++i) {
      if (gmm_inner(fit, y_[i], odds_[i] < 0) && x_[i] > largest) {
        largest = x_[i];
      }
    }
    return largest > -gmm_infinity() ? largest : fit.origin;
  }

  std::unique_ptr<double[]> memory_;
  double *x_ = nullptr, *y_ = nullptr, *top_ = nullptr, *odds_ = nullptr, *e_ = nullptr;
  int64_t capacity_ = 0, n_ = 0;
};

template <typename T>
void solve(Workspace& workspace, const T* values, const RowRange& range, int64_t problem, const GmmOptions& options,
           const GmmOutputs& out) {
  workspace.reserve(range.size);
  GmmFit fit = workspace.take(values + range.begin, range.size, options.sign());
  double threshold = 0;
  if (fit.count > 0) {
    workspace.fit(options, fit);
    threshold = options.sign() * workspace.threshold(fit, options.rule);
  }
  const T limit = static_cast<T>(threshold);
  static_cast<T*>(out.threshold)[problem] = limit;
  out.store(problem, fit, options);
  for (int64_t i = range.begin; i < range.begin + range.size; ++i) {
    const bool good = options.reverse ? values[i] >= limit : values[i] <= limit;
    out.keep[i] = good & is_finite(values[i]);  // without samples none is finite
  }
}

template <typename T>
void solve_all(const T* values, const RowRanges& ranges, const GmmOptions& options, const GmmOutputs& out) {
  constexpr int64_t kWorkPerSample = 128;
  const int64_t mean_size = ranges.rows / std::max<int64_t>(ranges.batch, 1);
  parallel_rows(ranges.batch, (mean_size + 8) * kWorkPerSample, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    for (int64_t p = begin; p < end; ++p) {
      solve(workspace, values, ranges.of(p), p, options, out);
    }
  });
}

const int64_t* index_data(const std::optional<Tensor>& index) {
  return index ? static_cast<const int64_t*>(index->data_ptr()) : nullptr;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results allocate(const Tensor& values, int64_t batch) {
  return {new_output({batch}, values.scalar_type()), new_output(leading_sizes(values, values.dim()), ScalarType::Bool),
          new_output({7 * batch}, ScalarType::Double), new_output({3, batch}, ScalarType::Int)};
}

GmmOutputs pointers(const Results& r, int64_t batch) {
  return {std::get<0>(r).data_ptr(), static_cast<bool*>(std::get<1>(r).data_ptr()),
          static_cast<double*>(std::get<2>(r).data_ptr()), static_cast<int32_t*>(std::get<3>(r).data_ptr()), batch};
}

Results gmm_threshold(Tensor values, std::optional<Tensor> offsets, std::optional<Tensor> counts, int64_t batch,
                      double reg_covar, double tol, int64_t max_iter, bool reverse, int64_t rule) {
  const RowRanges ranges{index_data(offsets), index_data(counts), values.numel(), batch};
  const GmmOptions options{reg_covar, tol, static_cast<int>(max_iter), reverse, static_cast<GmmRule>(rule)};
  Results results = allocate(values, batch);
  const GmmOutputs out = pointers(results, batch);
  if (offsets || counts) {  // rows that no problem owns
    std::memset(out.keep, 0, static_cast<size_t>(ranges.rows));
  }
  if (values.scalar_type() == ScalarType::Double) {
    solve_all(static_cast<const double*>(values.data_ptr()), ranges, options, out);
  } else {
    solve_all(static_cast<const float*>(values.data_ptr()), ranges, options, out);
  }
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("gmm_threshold", TORCH_BOX(&gmm_threshold)); }

}  // namespace
}  // namespace ssod
