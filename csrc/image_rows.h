// Which image owns a row of a batch: an index per row, or offsets of the images.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "boxes.h"

namespace ssod {

// Width and height of the image of a row, and its index, which is in range wherever there are images.
template <typename T>
struct OwnImage {
  T w, h;
  int64_t index;
};

template <typename T>
struct ImageRows {
  const int64_t* image;    // [rows], or null
  const int64_t* offsets;  // [images + 1], or null
  const T* hw;             // [images, 2]
  int64_t images;

  // Last image whose first row is not behind `row`, or -1. Stays in the array whatever it holds.
  SSOD_HD int64_t last_start(int64_t row) const {
    int64_t low = 0, high = images + 1;  // the first offset behind `row` lies in [low, high]
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - 1;
  }

  // A row of no image has the size 0 x 0.
  SSOD_HD OwnImage<T> of(int64_t row) const {
    const int64_t b = image ? image[row] : last_start(row);
    if (b >= 0 && b < images) {
      return {hw[2 * b + 1], hw[2 * b], b};
    }
    const int64_t last = images > 0 ? images - 1 : 0;
    return {T(0), T(0), b < 0 ? 0 : last};
  }
};

template <typename T>
ImageRows<T> make_image_rows(const std::optional<torch::stable::Tensor>& image_index,
                             const std::optional<torch::stable::Tensor>& offsets,
                             const torch::stable::Tensor& image_hw) {
  const auto integers = [](const std::optional<torch::stable::Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
  };
  return {integers(image_index), integers(offsets), static_cast<const T*>(image_hw.data_ptr()), image_hw.size(0)};
}

}  // namespace ssod
