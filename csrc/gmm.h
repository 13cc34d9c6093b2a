// Expectation-maximisation of two Gaussians in one dimension, and the sample that splits them.
//
// The formulas are scikit-learn's, on samples taken about the least one. Moments are taken about the current means, so
// that one pass over the samples does an iteration without cancellation. Everything is float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "boxes.h"
#include "row_ranges.h"

namespace ssod {

enum class GmmRule : int64_t { density, posterior };

enum GmmFlag : int32_t { kGmmEmpty = 1, kGmmSingle = 2, kGmmConstant = 4, kGmmNotConverged = 8 };

struct GmmOptions {
  double reg_covar, tol;
  int max_iter;
  bool reverse;
  GmmRule rule;

  SSOD_HD double sign() const { return reverse ? -1.0 : 1.0; }
};

struct TwoDoubles {
  double first, second;
};

SSOD_HD double gmm_infinity() { return static_cast<double>(INFINITY); }

SSOD_HD bool is_finite(double x) { return x - x == 0; }

// What one E-step hands to the M-step.
struct GmmSums {
  TwoDoubles mass;     // sum of responsibilities
  TwoDoubles first;    // sum of responsibility * (y - mean)
  TwoDoubles second;   // sum of responsibility * (y - mean)^2
  double log_density;  // sum over samples
};

// Parameters about `origin`.
struct GmmFit {
  double origin, spread, count;  // least sample, largest minus least, number of samples
  double mean[2], variance[2], weight[2];
  double bound;
  int iterations;
  bool converged;
};

SSOD_HD GmmFit gmm_start(double least, double largest, double count) {
  const bool some = count > 0;
  const double origin = some ? least : 0, spread = some ? largest - least : 0;
  return {origin, spread, count, {0, spread}, {1, 1}, {0.5, 0.5}, -gmm_infinity(), 0, false};
}

// Logs of weighted densities: constant[k] - scale[k] * (y - mean[k])^2.
struct GmmDensity {
  double mean[2], constant[2], scale[2];

  SSOD_HD TwoDoubles at(double y) const {
    const double a = y - mean[0], b = y - mean[1];
    return {constant[0] - scale[0] * (a * a), constant[1] - scale[1] * (b * b)};
  }
};

SSOD_HD GmmDensity gmm_density(const GmmFit& fit) {
  constexpr double kHalfLogTwoPi = 0.91893853320467274178032973640562;
  GmmDensity density{};
  for (int k = 0; k < 2; ++k) {
    density.mean[k] = fit.mean[k];
    density.constant[k] = std::log(fit.weight[k]) - 0.5 * std::log(fit.variance[k]) - kHalfLogTwoPi;
    density.scale[k] = 0.5 / fit.variance[k];
  }
  return density;
}

// M-step and test of convergence.
SSOD_HD void gmm_advance(GmmFit& fit, const GmmSums& sums, const GmmOptions& options) {
  constexpr double kLeastMass = 10 * 2.220446049250313e-16;
  const double mass[2] = {sums.mass.first, sums.mass.second};
  const double first[2] = {sums.first.first, sums.first.second};
  const double second[2] = {sums.second.first, sums.second.second};
  const double total = (mass[0] + kLeastMass) + (mass[1] + kLeastMass);
  for (int k = 0; k < 2; ++k) {
    const double guarded = mass[k] + kLeastMass;
    const double mean = (first[k] + fit.mean[k] * mass[k]) / guarded;
    const double shift = mean - fit.mean[k];
    const double variance = (second[k] - shift * (2 * first[k] - shift * mass[k])) / guarded;
    fit.mean[k] = mean;
    fit.variance[k] = (variance > 0 ? variance : 0) + options.reg_covar;
    fit.weight[k] = guarded / total;
  }
  const double bound = sums.log_density / fit.count;
  fit.converged = std::fabs(bound - fit.bound) < options.tol;
  fit.bound = bound;
  ++fit.iterations;
}

SSOD_HD int32_t gmm_flag(const GmmFit& fit) {
  if (fit.count == 0) {
    return kGmmEmpty;
  }
  const int special = fit.count == 1 ? kGmmSingle : (fit.spread == 0 ? kGmmConstant : 0);
  return special + (fit.converged ? 0 : kGmmNotConverged);
}

// A sample that may be the threshold of the rule "density": the densest, then the least.
struct GmmCandidate {
  double density, x;

  SSOD_HD bool exists() const { return x < gmm_infinity(); }
};

SSOD_HD GmmCandidate no_candidate() { return {-gmm_infinity(), gmm_infinity()}; }

SSOD_HD GmmCandidate better(const GmmCandidate& a, const GmmCandidate& b) {
  const bool second = b.density > a.density || (b.density == a.density && b.x < a.x);
  return second ? b : a;
}

// The threshold of the rule "posterior" is the largest sample for which this holds.
SSOD_HD bool gmm_inner(const GmmFit& fit, double y, bool second_label) {
  const bool swapped = fit.mean[1] < fit.mean[0];
  return second_label == swapped && y <= fit.mean[swapped ? 0 : 1];
}

// Where the results of a batch go; P problems.
struct GmmOutputs {
  void* threshold;     // [P], dtype of the samples
  bool* keep;          // as the samples
  double* statistics;  // [7 * P]: means, variances and weights, [P, 2] each, and lower bounds
  int32_t* counters;   // [3, P]: iterations, samples that count, flag
  int64_t batch;       // P

  SSOD_HD void store(int64_t problem, const GmmFit& fit, const GmmOptions& options) const {
    const bool some = fit.count > 0;
    for (int k = 0; k < 2; ++k) {
      double* pair = statistics + 2 * problem + k;
      pair[0] = some ? options.sign() * (fit.origin + fit.mean[k]) : 0;
      pair[2 * batch] = some ? fit.variance[k] : options.reg_covar;
      pair[4 * batch] = fit.weight[k];
    }
    statistics[6 * batch + problem] = some ? fit.bound : 0;
    counters[problem] = fit.iterations;
    counters[batch + problem] = static_cast<int32_t>(fit.count);
    counters[2 * batch + problem] = gmm_flag(fit);
  }
};

// The samples of one problem as one member of a team sees them: every size()-th, the first kHeld of them in registers.
// Samples that take no part are NaN.
template <int kHeld, typename T>
class GmmSamples {
 public:
  SSOD_HD GmmSamples(const T* values, int64_t count, int rank, int size, double sign)
      : values_(values), count_(count), rank_(rank), size_(size), sign_(sign) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < kHeld; ++k) {
      const int64_t i = rank + int64_t{k} * size;
      held_[k] = i < count ? load(i) : static_cast<double>(NAN);
    }
  }

  // Calls f(x) for this member's samples that take part.
  template <typename F>
  SSOD_HD void for_each(const F& f) const {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < kHeld; ++k) {
      if (held_[k] == held_[k]) {
        f(held_[k]);
      }
    }
    for (int64_t i = rank_ + int64_t{kHeld} * size_; i < count_; i += size_) {
      const double x = load(i);
      if (x == x) {
        f(x);
      }
    }
  }

 private:
  SSOD_HD double load(int64_t i) const {
    const double x = static_cast<double>(values_[i]);
    return is_finite(x) ? sign_ * x : static_cast<double>(NAN);
  }

  const T* values_;
  int64_t count_;
  int rank_, size_;
  double sign_, held_[kHeld];
};

struct AddPairs {
  SSOD_HD TwoDoubles operator()(const TwoDoubles& a, const TwoDoubles& b) const {
    return {a.first + b.first, a.second + b.second};
  }
};

struct WidenRange {
  SSOD_HD TwoDoubles operator()(const TwoDoubles& a, const TwoDoubles& b) const {
    return {b.first < a.first ? b.first : a.first, b.second > a.second ? b.second : a.second};
  }
};

struct BetterCandidate {
  SSOD_HD GmmCandidate operator()(const GmmCandidate& a, const GmmCandidate& b) const { return better(a, b); }
};

template <typename Team, typename Samples>
SSOD_HD GmmFit team_start(Team& team, const Samples& samples) {
  TwoDoubles range{gmm_infinity(), -gmm_infinity()}, count{0, 0};
  samples.for_each([&](double x) {
    range = WidenRange()(range, {x, x});
    count.first += 1;
  });
  range = team.reduce(range, WidenRange());
  count = team.reduce(count, AddPairs());
  return gmm_start(range.first, range.second, count.first);
}

// Adds one sample to the sums of an E-step.
SSOD_HD void gmm_accumulate(GmmSums& sums, const GmmDensity& density, double y) {
  const TwoDoubles joint = density.at(y);
  const double odds = joint.second - joint.first;
  const double e = std::exp(-std::fabs(odds)), more = 1 / (1 + e), less = e * more;
  const double share[2] = {odds > 0 ? less : more, odds > 0 ? more : less};
  const double a = y - density.mean[0], b = y - density.mean[1];
  sums.mass = {sums.mass.first + share[0], sums.mass.second + share[1]};
  sums.first = {sums.first.first + share[0] * a, sums.first.second + share[1] * b};
  sums.second = {sums.second.first + share[0] * (a * a), sums.second.second + share[1] * (b * b)};
  sums.log_density += (odds > 0 ? joint.second : joint.first) + std::log1p(e);
}

template <typename Team, typename Samples>
SSOD_HD GmmSums team_expect(Team& team, const Samples& samples, const GmmFit& fit) {
  const GmmDensity density = gmm_density(fit);
  GmmSums sums{};
  samples.for_each([&](double x) { gmm_accumulate(sums, density, x - fit.origin); });
  sums.mass = team.reduce(sums.mass, AddPairs());
  sums.first = team.reduce(sums.first, AddPairs());
  sums.second = team.reduce(sums.second, AddPairs());
  sums.log_density = team.reduce(TwoDoubles{sums.log_density, 0}, AddPairs()).first;
  return sums;
}

template <typename Team, typename Samples>
SSOD_HD double team_densest(Team& team, const Samples& samples, const GmmFit& fit) {
  const GmmDensity density = gmm_density(fit);
  GmmCandidate best[2] = {no_candidate(), no_candidate()};
  samples.for_each([&](double x) {
    const TwoDoubles joint = density.at(x - fit.origin);
    const double odds = joint.second - joint.first, top = odds > 0 ? joint.second : joint.first;
    const double value = top + std::log1p(std::exp(-std::fabs(odds)));
    const GmmCandidate candidate{value == value ? value : -gmm_infinity(), x};
    if (odds > 0) {
      best[1] = better(best[1], candidate);
    } else {
      best[0] = better(best[0], candidate);
    }
  });
  const GmmCandidate first = team.reduce(best[0], BetterCandidate());
  const GmmCandidate second = team.reduce(best[1], BetterCandidate());
  return first.exists() ? first.x : second.x;
}

template <typename Team, typename Samples>
SSOD_HD double team_outermost(Team& team, const Samples& samples, const GmmFit& fit) {
  const GmmDensity density = gmm_density(fit);
  TwoDoubles largest{0, -gmm_infinity()};
  samples.for_each([&](double x) {
    const double y = x - fit.origin;
    const TwoDoubles joint = density.at(y);
    if (gmm_inner(fit, y, joint.second > joint.first) && x > largest.second) {
      largest.second = x;
    }
  });
  largest = team.reduce(largest, WidenRange());
  return largest.second > -gmm_infinity() ? largest.second : fit.origin;
}

// Fits one problem and stores its results; all members of the team call it.
template <int kHeld, typename T, typename Team>
SSOD_HD void gmm_solve(Team& team, const T* values, const RowRanges& ranges, int64_t problem, const GmmOptions& options,
                       const GmmOutputs& out) {
  const RowRange range = ranges.of(problem);
  const GmmSamples<kHeld, T> samples(values + range.begin, range.size, team.rank(), team.size(), options.sign());
  GmmFit fit = team_start(team, samples);
  while (fit.count > 0 && !fit.converged && fit.iterations < options.max_iter) {
    gmm_advance(fit, team_expect(team, samples, fit), options);
  }
  double threshold = 0;
  if (fit.count > 0) {
    const bool densest = options.rule == GmmRule::density;
    threshold = options.sign() * (densest ? team_densest(team, samples, fit) : team_outermost(team, samples, fit));
  }
  if (team.rank() == 0) {
    static_cast<T*>(out.threshold)[problem] = static_cast<T>(threshold);
    out.store(problem, fit, options);
  }
  for (int64_t i = team.rank(); i < range.size; i += team.size()) {
    const double x = static_cast<double>(values[range.begin + i]);
    out.keep[range.begin + i] = is_finite(x) && fit.count > 0 && options.sign() * x <= options.sign() * threshold;
  }
}

// Marks the padding of a problem as not kept.
template <typename Team>
SSOD_HD void gmm_clear_padding(Team& team, const RowRanges& ranges, int64_t problem, bool* keep) {
  if (ranges.counts) {
    const int64_t width = ranges.rows / ranges.batch;
    for (int64_t i = ranges.of(problem).size + team.rank(); i < width; i += team.size()) {
      keep[problem * width + i] = false;
    }
  }
}

}  // namespace ssod
