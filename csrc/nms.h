// Class-aware non-maximum suppression: the overlap of torchvision's nms, and the sweep of a team over sorted boxes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "boxes.h"

namespace ssod {

template <typename T>
struct NmsBox {
  T x1, y1, x2, y2, area;
};

template <typename T>
SSOD_HD NmsBox<T> make_nms_box(const T* corners) {
  const T x1 = corners[0], y1 = corners[1], x2 = corners[2], y2 = corners[3];
  return {x1, y1, x2, y2, (x2 - x1) * (y2 - y1)};
}

template <typename T>
SSOD_HD bool is_finite_box(const T* corners) {
  const T none =
      ((corners[0] - corners[0]) + (corners[1] - corners[1])) + ((corners[2] - corners[2]) + (corners[3] - corners[3]));
  return none == T(0);  // x - x is NaN where x is not finite
}

// Whether a kept box suppresses a later one. NaN, from two boxes without area, does not.
template <typename T>
SSOD_HD bool suppresses(const NmsBox<T>& kept, const NmsBox<T>& later, T threshold) {
  const T w = positive(lower(kept.x2, later.x2) - upper(kept.x1, later.x1));
  const T h = positive(lower(kept.y2, later.y2) - upper(kept.y1, later.y1));
  const T inter = w * h;
  return inter / ((kept.area + later.area) - inter) > threshold;
}

// The largest T that is not above the threshold: an overlap in T is above it exactly where it is above the threshold.
template <typename T>
T threshold_in(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold ? std::nextafter(rounded, -static_cast<T>(INFINITY)) : rounded;
}

SSOD_HD int count_bits(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

constexpr int kNmsTile = 64;  // boxes: one word of bits
constexpr int kNmsParts = 4;  // members that share the tests of one box
constexpr int kNmsPartSize = kNmsTile / kNmsParts;

// What a team works on at a time, in shared memory.
template <typename T>
struct NmsTileState {
  NmsBox<T> box[kNmsTile];
  int64_t label[kNmsTile];
  int64_t index[kNmsTile];
  uint16_t rivals[kNmsTile][kNmsParts];  // bits: which earlier boxes of the tile would suppress it
  uint8_t lost[kNmsTile][kNmsParts];     // suppressed by a box kept from an earlier tile, or not taking part
  uint8_t takes_part[kNmsTile];
};

// One image, its boxes sorted by score.
template <typename T>
struct NmsImage {
  const T* boxes;         // [n, 4], in the order of the input
  const int64_t* labels;  // [n], in the order of the input
  const T* scores;        // [n], best first; -inf for boxes that take no part, which come last
  const int64_t* order;   // [n], index of each of them in the input
  int64_t n;
  NmsBox<T>* kept;       // [most], memory of the team
  int64_t* kept_labels;  // [most], memory of the team
  int64_t* index;        // [most], output
  int64_t most;
  T threshold;
};

template <typename T>
SSOD_HD void nms_load(const NmsImage<T>& image, int64_t first, int t, NmsTileState<T>& tile) {
  const int64_t i = first + t;
  const bool takes_part = i < image.n && image.scores[i] > -static_cast<T>(INFINITY);
  tile.takes_part[t] = takes_part;
  if (takes_part) {
    const int64_t index = image.order[i];
    tile.index[t] = index;
    tile.label[t] = image.labels[index];
    tile.box[t] = make_nms_box(image.boxes + 4 * index);
  }
}

// One part of the tests of one box of the tile: against every kNmsParts-th kept box, and against some of its tile.
template <typename T>
SSOD_HD void nms_test(const NmsImage<T>& image, int64_t kept, int t, int part, NmsTileState<T>& tile) {
  bool lost = !tile.takes_part[t];
  unsigned rivals = 0;
  if (!lost) {
    const NmsBox<T> box = tile.box[t];
    const int64_t label = tile.label[t];
    for (int64_t k = part; k < kept && !lost; k += kNmsParts) {
      lost = image.kept_labels[k] == label && suppresses(image.kept[k], box, image.threshold);
    }
    for (int j = 0; j < kNmsPartSize; ++j) {
      const int other = part * kNmsPartSize + j;
      if (other < t && tile.label[other] == label && suppresses(tile.box[other], box, image.threshold)) {
        rivals |= 1u << j;
      }
    }
  }
  tile.lost[t][part] = lost;
  tile.rivals[t][part] = static_cast<uint16_t>(rivals);
}

// Which boxes of the tile are kept, as bits. Every member finds the same.
template <typename T>
SSOD_HD uint64_t nms_resolve(const NmsTileState<T>& tile) {
  uint64_t taken = 0;
  for (int t = 0; t < kNmsTile; ++t) {
    uint32_t lost;
    uint64_t rivals = 0;
    memcpy(&lost, tile.lost[t], sizeof(lost));
    for (int part = 0; part < kNmsParts; ++part) {
      rivals |= static_cast<uint64_t>(tile.rivals[t][part]) << (part * kNmsPartSize);
    }
    taken |= static_cast<uint64_t>(lost == 0 && (rivals & taken) == 0) << t;
  }
  return taken;
}

// Writes the index of the kept boxes, best first, and returns how many there are. All members of the team call it.
template <typename T, typename Team>
SSOD_HD int64_t nms_sweep(Team& team, const NmsImage<T>& image, NmsTileState<T>& tile) {
  static_assert(kNmsParts == sizeof(uint32_t) && kNmsPartSize == 16);
  int64_t kept = 0;
  for (int64_t first = 0; first < image.n && kept < image.most; first += kNmsTile) {
    for (int t = team.rank(); t < kNmsTile; t += team.size()) {
      nms_load(image, first, t, tile);
    }
    team.sync();
    if (!tile.takes_part[0]) {
      break;
    }
    for (int unit = team.rank(); unit < kNmsTile * kNmsParts; unit += team.size()) {
      nms_test(image, kept, unit % kNmsTile, unit / kNmsTile, tile);
    }
    team.sync();
    const uint64_t taken = nms_resolve(tile);
    for (int t = team.rank(); t < kNmsTile; t += team.size()) {
      const int64_t place = kept + count_bits(taken & ((uint64_t{1} << t) - 1));
      if ((taken >> t & 1) && place < image.most) {
        image.index[place] = tile.index[t];
        image.kept[place] = tile.box[t];
        image.kept_labels[place] = tile.label[t];
      }
    }
    kept += count_bits(taken);
    team.sync();
  }
  kept = kept < image.most ? kept : image.most;
  for (int64_t k = kept + team.rank(); k < image.most; k += team.size()) {
    image.index[k] = -1;
  }
  return kept;
}

}  // namespace ssod
