// Class-aware non-maximum suppression: boxes in order of score, each against the kept boxes of its class, many at a
// time, until one suppresses it or enough are kept.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cpu/outputs.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "nms.h"

namespace ssod {
namespace {

constexpr int kLanes = 16;

// Kept boxes of one class. Unused lanes hold a box whose overlap with any other is 0.
template <typename T>
struct alignas(64) KeptBlock {
  T x1[kLanes]{}, y1[kLanes]{}, x2[kLanes]{}, y2[kLanes]{}, area[kLanes];
  int32_t next = -1;  // block of the same class with worse boxes

  KeptBlock() { std::fill_n(area, kLanes, std::numeric_limits<T>::infinity()); }

  SSOD_HD void set(int lane, const NmsBox<T>& box) {
    x1[lane] = box.x1;
    y1[lane] = box.y1;
    x2[lane] = box.x2;
    y2[lane] = box.y2;
    area[lane] = box.area;
  }

  SSOD_HD bool any_suppresses(const NmsBox<T>& box, T threshold) const {
    int hits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      hits |= suppresses<T>({x1[lane], y1[lane], x2[lane], y2[lane], area[lane]}, box, threshold);
    }
    return hits != 0;
  }
};

// Numbers the labels that it meets, from 0 on.
class ClassNumbers {
 public:
  void clear() {
    near_.fill(-1);
    far_.clear();
    count_ = 0;
  }

  int32_t of(int64_t label) {
    const bool near = label >= 0 && label < static_cast<int64_t>(near_.size());
    int32_t& number = near ? near_[label] : far_.try_emplace(label, -1).first->second;
    if (number < 0) {
      number = count_++;
    }
    return number;
  }

 private:
  std::array<int32_t, 1024> near_;
  std::unordered_map<int64_t, int32_t> far_;
  int32_t count_ = 0;
};

// A key that sorts upwards as scores sort downwards; both zeros are one.
inline uint32_t descending_key(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

inline uint64_t descending_key(double score) {
  const auto bits = std::bit_cast<uint64_t>(score + 0.0);
  return bits >> 63 ? bits : ~(bits | (uint64_t{1} << 63));
}

template <typename Key>
struct Ranked {
  Key key;
  uint32_t index;
};

// Stable radix sort by key; digits in which all keys agree cost nothing.
template <typename Key>
void sort_ranked(std::vector<Ranked<Key>>& items, std::vector<Ranked<Key>>& buffer) {
  constexpr int kDigits = sizeof(Key);
  std::array<std::array<uint32_t, 256>, kDigits> counts{};
  for (const Ranked<Key>& item : items) {
    for (int d = 0; d < kDigits; ++d) {
      ++counts[d][item.key >> (8 * d) & 255];
    }
  }
  buffer.resize(items.size());
  for (int d = 0; d < kDigits; ++d) {
    std::array<uint32_t, 256>& places = counts[d];
    if (items.empty() || places[items[0].key >> (8 * d) & 255] == items.size()) {
      continue;
    }
    uint32_t place = 0;
    for (uint32_t& count : places) {
      place += std::exchange(count, place);
    }
    for (const Ranked<Key>& item : items) {
      buffer[places[item.key >> (8 * d) & 255]++] = item;
    }
    items.swap(buffer);
  }
}

// The tensors of one image.
template <typename T>
struct Image {
  const T* boxes;         // [n, 4]
  const T* scores;        // [n]
  const int64_t* labels;  // [n]
  int64_t n;              // those that are real
};

struct Options {
  double iou_threshold, score_threshold;
  int64_t most;
};

// Memory of one thread for one image.
template <typename T>
class Sweeper {
 public:
  // Writes the kept boxes and returns how many there are.
  int64_t run(const Image<T>& image, const Options& options, int64_t* index) {
    rank(image, options.score_threshold);
    classes_.clear();
    chains_.clear();
    blocks_.clear();
    return sweep(*this, image, threshold_in<T>(options.iou_threshold), options.most, index);
  }

 private:
  using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

  struct Chain {
    int32_t first, last;
    int used;  // lanes of the last block
  };

  void rank(const Image<T>& image, double score_threshold) {
    ranked_.clear();
    const T least = static_cast<T>(score_threshold);  // as torch compares a tensor with a number
    for (int64_t i = 0; i < image.n; ++i) {
      if (image.scores[i] > least && is_finite_box(image.boxes + 4 * i)) {
        ranked_.push_back({descending_key(image.scores[i]), static_cast<uint32_t>(i)});
      }
    }
    sort_ranked(ranked_, buffer_);
  }

  SSOD_HD bool suppressed(const Chain& chain, const NmsBox<T>& box, T threshold) const {
    for (int32_t b = chain.first; b >= 0; b = blocks_[b].next) {
      if (blocks_[b].any_suppresses(box, threshold)) {
        return true;
      }
    }
    return false;
  }

  void keep(int32_t number, const NmsBox<T>& box) {
    if (number == static_cast<int32_t>(chains_.size())) {
      const auto block = static_cast<int32_t>(blocks_.size());
      blocks_.emplace_back();
      chains_.push_back({block, block, 0});
    }
    Chain& chain = chains_[number];
    if (chain.used == kLanes) {
      const auto block = static_cast<int32_t>(blocks_.size());
      blocks_.emplace_back();
      blocks_[chain.last].next = block;
      chain.last = block;
      chain.used = 0;
    }
    blocks_[chain.last].set(chain.used++, box);
  }

  SSOD_CLONES static int64_t sweep(Sweeper& self, const Image<T>& image, T threshold, int64_t most, int64_t* index) {
    int64_t kept = 0;
    for (size_t r = 0; r < self.ranked_.size() && kept < most; ++r) {
      const int64_t i = self.ranked_[r].index;
      const NmsBox<T> box = make_nms_box(image.boxes + 4 * i);
      const int32_t number = self.classes_.of(image.labels[i]);
      const bool known = number < static_cast<int32_t>(self.chains_.size());
      if (!known || !self.suppressed(self.chains_[number], box, threshold)) {
        self.keep(number, box);
        index[kept++] = i;
      }
    }
    return kept;
  }

  ClassNumbers classes_;
  std::vector<Chain> chains_;
  std::vector<KeptBlock<T>> blocks_;
  std::vector<Ranked<Key>> ranked_, buffer_;
};

template <typename T>
void run(const Tensor& boxes, const Tensor& scores, const Tensor& labels, const int64_t* counts, const Options& options,
         int64_t* index, int64_t* count) {
  constexpr int64_t kWorkPerBox = 64;
  const auto* b = static_cast<const T*>(boxes.data_ptr());
  const auto* s = static_cast<const T*>(scores.data_ptr());
  const auto* l = static_cast<const int64_t*>(labels.data_ptr());
  const int64_t n = scores.size(1);
  parallel_rows(scores.size(0), n * kWorkPerBox, [&](int64_t begin, int64_t end) {
    Sweeper<T> sweeper;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t real = counts ? std::clamp<int64_t>(counts[i], 0, n) : n;
      int64_t* out = index + i * options.most;
      count[i] = sweeper.run({b + 4 * n * i, s + n * i, l + n * i, real}, options, out);
      std::fill(out + count[i], out + options.most, -1);
    }
  });
}

std::tuple<Tensor, Tensor> batched_nms(Tensor boxes, Tensor scores, Tensor labels, std::optional<Tensor> counts,
                                       double iou_threshold, double score_threshold, int64_t max_keep) {
  const int64_t images = scores.size(0), most = std::min(max_keep, scores.size(1));
  Tensor index = new_output({images, most}, ScalarType::Long), count = new_output({images}, ScalarType::Long);
  const auto go = scores.scalar_type() == ScalarType::Double ? run<double> : run<float>;
  go(boxes, scores, labels, counts ? static_cast<const int64_t*>(counts->data_ptr()) : nullptr,
     {iou_threshold, score_threshold, most}, static_cast<int64_t*>(index.data_ptr()),
     static_cast<int64_t*>(count.data_ptr()));
  return {index, count};
}

STABLE_TORCH_LIBRARY_IMPL(ssod_fast, CPU, m) { m.impl("batched_nms", TORCH_BOX(&batched_nms)); }

}  // namespace
}  // namespace ssod
