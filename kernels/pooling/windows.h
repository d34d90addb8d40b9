// Pooling windows and the labels of their taps, for max_pool2d and max_unpool2d on the CPU.
//
// A label names a tap of a window in 32 bits, in either index format:
//     compact  kh * KW + kw, which is the index itself
//     flat     kh * dh * W + kw * dw, the index y * W + x less that of tap (0, 0)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/arguments.h"
#include "fastseg/layout.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg::pooling {

using simd::kLanes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One dimension of the windows. Tap k of window o lies at start(o) + k * dilation.
struct Axis {
  int64_t kernel, stride, padding, dilation;
  int64_t input, output;  // extents

  int64_t start(int64_t o) const { return o * stride - padding; }

  // The taps of window o inside the input: [first_tap, end_tap).
  int64_t first_tap(int64_t o) const {
    const int64_t before = -start(o);
    return before > 0 ? ceil_divide(before, dilation) : 0;
  }
  int64_t end_tap(int64_t o) const {
    const int64_t left = input - start(o);
    return left > 0 ? std::min(kernel, ceil_divide(left, dilation)) : 0;
  }

  // The window whose tap k lies at `position`, or -1.
  int64_t window_of(int64_t position, int64_t k) const {
    const int64_t distance = position + padding - k * dilation;
    if (distance < 0 || distance % stride != 0) return -1;
    return distance / stride < output ? distance / stride : -1;
  }
};

struct Windows {
  Axis y, x;
  bool flat;  // format of the indices

  int64_t taps() const { return y.kernel * x.kernel; }
  int32_t label(int64_t kh, int64_t kw) const {
    const int64_t label = flat ? kh * y.dilation * x.input + kw * x.dilation : kh * x.kernel + kw;
    return static_cast<int32_t>(label);
  }
  // The index is the label plus this.
  int64_t label_origin(int64_t oy, int64_t ox) const { return flat ? y.start(oy) * x.input + x.start(ox) : 0; }
};

// (N, C) planes in one of the two layouts.
struct Planes {
  int64_t images, channels;
  bool channels_last;
};

// ---- lanes of labels as wide as the lanes of values ----

template <typename compute_t>
using Labels = simd::mask<compute_t>;

template <typename compute_t>
FASTSEG_INLINE Labels<compute_t> splat_label(int32_t label) {
  return simd::convert<Labels<compute_t>>(simd::splat(label));
}

template <typename compute_t, typename label_t>
FASTSEG_INLINE Labels<compute_t> load_labels(const label_t* from) {
  return simd::convert<Labels<compute_t>>(simd::load(from));
}

// The taps of 16 neighbouring outputs: windows next to each other in a plane, or channels of one window. Tap
// (kh, kw) lies at rows[kh].values + columns[kw].offset.
struct TapColumn {
  int64_t offset;
  int32_t label;
};
template <typename value_t>
struct TapRow {
  const value_t* values;
  int32_t label;
};
template <typename value_t>
struct Taps {
  std::vector<TapRow<value_t>> rows;
  std::vector<TapColumn> columns;

  // Calls body(values, label) for every row and the columns [first, end), in the order of the window.
  template <typename Body>
  FASTSEG_INLINE void for_each(int64_t first, int64_t end, const Body& body) const {
    for (const TapRow<value_t>& row : rows) {
      for (int64_t kw = first; kw < end; ++kw) {
        body(row.values + columns[kw].offset, row.label + columns[kw].label);
      }
    }
  }
};

// Sets the taps of row `oy` of windows in interleaved pixels [H, W, C]: their rows, and the columns of window `ox`.
template <typename value_t>
void rows_of_taps(const value_t* pixels, const Windows& windows, int64_t oy, int64_t channels, Taps<value_t>& taps) {
  taps.rows.clear();
  for (int64_t kh = windows.y.first_tap(oy); kh < windows.y.end_tap(oy); ++kh) {
    const int64_t y = windows.y.start(oy) + kh * windows.y.dilation;
    taps.rows.push_back({pixels + y * windows.x.input * channels, windows.label(kh, 0)});
  }
}
template <typename value_t>
FASTSEG_INLINE void columns_of_taps(const Windows& windows, int64_t ox, int64_t channels, Taps<value_t>& taps) {
  for (int64_t kw = 0; kw < windows.x.kernel; ++kw) {
    const int64_t x = windows.x.start(ox) + kw * windows.x.dilation;
    taps.columns[kw] = {x * channels, windows.label(0, kw)};
  }
}

// ---- from tensors, checking only what memory safety needs ----

inline Axis axis_of(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int axis, int64_t input,
                    int64_t output) {
  const bool inside = (static_cast<double>(output) - 1) * stride[axis] < static_cast<double>(input) + padding[axis];
  FASTSEG_CHECK(inside, "fastseg pooling: windows begin beyond the image");
  const int64_t step = output == 1 ? 1 : stride[axis];  // one window has any stride; 1 keeps tables small
  return {kernel_size[axis], step, padding[axis], dilation[axis], input, output};
}

// image: the input of the pooling or the output of the unpooling; pooled: the other one.
inline Windows windows_of(const Tensor& image, const Tensor& pooled, const Tensor& indices,
                          const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto pair_from = [](const std::vector<int64_t>& values, int64_t least) {
    return values.size() == 2 && std::min(values[0], values[1]) >= least;
  };
  FASTSEG_CHECK(pair_from(kernel_size, 1) && pair_from(stride, 1) && pair_from(padding, 0) && pair_from(dilation, 1),
                "fastseg pooling: kernel_size, stride, padding and dilation must be pairs in range");
  const bool flat = indices.scalar_type() == ScalarType::Long;
  const Windows windows{axis_of(kernel_size, stride, padding, dilation, 0, image.size(2), pooled.size(2)),
                        axis_of(kernel_size, stride, padding, dilation, 1, image.size(3), pooled.size(3)), flat};
  const double reach = static_cast<double>(windows.y.kernel) * windows.y.dilation * windows.x.input +
                       static_cast<double>(windows.x.kernel) * windows.x.dilation;
  FASTSEG_CHECK(reach < INT32_MAX, "fastseg pooling: a window spans 2^31 pixels or more");
  FASTSEG_CHECK(flat || windows.taps() <= 255, "fastseg pooling: more than 255 taps in compact form");
  return windows;
}

// The common layout of the three tensors; also checks shapes.
inline Planes planes_of(const Tensor& image, const Tensor& pooled, const Tensor& indices) {
  const auto is_four = [](const Tensor& tensor) { return tensor.is_cpu() && tensor.dim() == 4; };
  FASTSEG_CHECK(is_four(image) && is_four(pooled) && is_four(indices),
                "fastseg pooling: tensors must be (N, C, H, W) on the CPU");
  for (int axis = 0; axis < 4; ++axis) {
    FASTSEG_CHECK(indices.size(axis) == pooled.size(axis) && (axis > 1 || image.size(axis) == pooled.size(axis)),
                  "fastseg pooling: tensors differ in size");
  }
  const ScalarType type = indices.scalar_type();
  FASTSEG_CHECK(type == ScalarType::Long || type == ScalarType::Byte,
                "fastseg pooling: indices must be int64 or uint8");
  FASTSEG_CHECK(image.scalar_type() == pooled.scalar_type(), "fastseg pooling: values differ in dtype");
  const bool planar = image.is_contiguous() && pooled.is_contiguous() && indices.is_contiguous();
  const bool interleaved = is_channels_last(image) && is_channels_last(pooled) && is_channels_last(indices);
  FASTSEG_CHECK(planar || interleaved, "fastseg pooling: tensors must share a layout");
  return {image.size(0), image.size(1), !planar};
}

}  // namespace fastseg::pooling
