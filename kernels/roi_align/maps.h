// Feature maps and boxes for the CPU kernels of roi_align and roi_pool: maps of either memory format are walked as
// blocks of neighbouring channels.
#pragma once

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastseg/arguments.h"
#include "fastseg/layout.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"
#include "fastseg/transpose.h"

namespace fastseg::roi {

using simd::kLanes;

// A dense tensor [N, C, H, W].
template <typename scalar_t>
struct Map {
  scalar_t* data;
  int64_t channels, height, width;
  bool interleaved;  // stored as [N, H, W, C]

  int64_t pixels() const { return height * width; }
  scalar_t* at(int64_t image, int64_t channel, int64_t pixel) const {
    scalar_t* start = data + image * channels * pixels();
    return interleaved ? start + pixel * channels + channel : start + channel * pixels() + pixel;
  }
};

inline bool is_interleaved(const Tensor& tensor, const char* name) {
  FASTSEG_CHECK(tensor.is_cpu() && tensor.dim() == 4, name, " must be a CPU tensor of 4 dimensions");
  const bool contiguous = tensor.is_contiguous();
  FASTSEG_CHECK(contiguous || is_channels_last(tensor), name, " must be contiguous or channels_last");
  return !contiguous;
}

template <typename scalar_t>
Map<const scalar_t> map_of(const Tensor& tensor, const char* name) {
  FASTSEG_CHECK(tensor.scalar_type() == scalar_type_of<scalar_t>(), name, " must have the dtype of the others");
  const bool interleaved = is_interleaved(tensor, name);
  return {tensor.const_data_ptr<scalar_t>(), tensor.size(1), tensor.size(2), tensor.size(3), interleaved};
}

template <typename scalar_t>
Map<scalar_t> output_map(const Tensor& tensor, const char* name) {
  const Map<const scalar_t> map = map_of<scalar_t>(tensor, name);
  return {tensor.mutable_data_ptr<scalar_t>(), map.channels, map.height, map.width, map.interleaved};
}

// A part of a map.
struct Window {
  int64_t top = 0, left = 0, bottom = 0, right = 0;

  bool empty() const { return top >= bottom || left >= right; }
  int64_t width() const { return right - left; }
  int64_t area() const { return empty() ? 0 : (bottom - top) * (right - left); }
  void include(const Window& other) {
    if (other.empty()) return;
    if (empty()) {
      *this = other;
      return;
    }
    top = std::min(top, other.top);
    left = std::min(left, other.left);
    bottom = std::max(bottom, other.bottom);
    right = std::max(right, other.right);
  }
};

// The pixels of a window; the channels of a pixel are neighbours.
template <typename scalar_t>
struct Block {
  scalar_t* data;
  int64_t pixel, row;  // distances in elements

  scalar_t* at(int64_t y, int64_t x) const { return data + y * row + x * pixel; }
};

// The boxes, [K, 5]; throws if a batch index is out of range.
template <typename value_t>
const value_t* boxes_of(const char* op, const Tensor& boxes, int64_t images) {
  FASTSEG_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "fastseg.ops.", op, ": boxes must be (K, 5)");
  const value_t* values = dense_values<value_t>(boxes, boxes.numel(), "boxes");
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    const value_t index = values[5 * k];
    if (!(index > -1 && index < static_cast<value_t>(images))) {
      std::ostringstream message;
      message << "fastseg.ops." << op << ": boxes[" << k << "] has batch index " << index << "; allowed: ";
      if (images == 0) message << "no box, input is an empty batch";
      else message << "0 to " << images - 1;
      throw std::out_of_range(message.str());
    }
  }
  return values;
}

}  // namespace fastseg::roi
