// Turns the arguments of the pooling ops into the launchers' PoolShape. Checks only what memory safety needs: Python
// has checked the rest. Shared by the registrations of max_pool2d and max_unpool2d.
#pragma once

#include <initializer_list>
#include <vector>

#include "cuda/host.h"
#include "fastseg/layout.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// The four lists of an op, each (rows, columns).
struct PoolArguments {
  const std::vector<int64_t>&kernel_size, &stride, &padding, &dilation;

  bool are_pairs() const {
    return kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2;
  }
};

// Without windows (kernel 0) if the arguments describe none, or windows whose positions do not fit 32 bits.
inline Axis make_axis(const PoolArguments& arguments, int which, int64_t size, int64_t windows) {
  constexpr int64_t most = int64_t{1} << 30;
  Axis axis{static_cast<int>(size), static_cast<int>(windows), 0, 1, 0, 1};
  if (!arguments.are_pairs()) return axis;
  const int64_t kernel = arguments.kernel_size[which], stride = arguments.stride[which];
  const int64_t padding = arguments.padding[which], dilation = arguments.dilation[which];
  const auto within = [](int64_t value, int64_t least) { return value >= least && value <= most; };
  const bool positive = within(kernel, 1) && within(stride, 1) && within(padding, 0) && within(dilation, 1);
  if (!positive || windows * stride + (kernel - 1) * dilation > most || size + padding + stride > most) return axis;
  axis.kernel = static_cast<int>(kernel);
  axis.stride = static_cast<int>(stride);
  axis.padding = static_cast<int>(padding);
  axis.dilation = static_cast<int>(dilation);
  return axis;
}

// `pooled` tensors are (N, C, PH, PW), the `plane` one is (N, C, H, W); all contiguous or all channels_last.
inline PoolShape make_shape(const char* op, const PoolArguments& arguments, NamedTensor plane,
                            std::initializer_list<NamedTensor> pooled) {
  constexpr int64_t most_size = int64_t{1} << 30;
  const auto check = [&](const NamedTensor& named) {
    check_device(named.tensor, op, named.name);
    FASTSEG_CHECK(named.tensor.dim() == 4, "fastseg::", op, ": ", named.name, " must have 4 dimensions");
    FASTSEG_CHECK(named.tensor.get_device_index() == plane.tensor.get_device_index(), "fastseg::", op, ": ", named.name,
                  " and ", plane.name, " are on different devices");
  };
  check(plane);
  const Tensor& first = pooled.begin()->tensor;
  bool contiguous = plane.tensor.is_contiguous(), channels_last = is_channels_last(plane.tensor);
  for (const NamedTensor& named : pooled) {
    check(named);
    for (int dimension = 0; dimension < 4; ++dimension) {
      const int64_t expected = dimension < 2 ? plane.tensor.size(dimension) : first.size(dimension);
      FASTSEG_CHECK(named.tensor.size(dimension) == expected, "fastseg::", op, ": ", named.name, " has size ",
                    named.tensor.size(dimension), " in dimension ", dimension, "; allowed: ", expected);
      FASTSEG_CHECK(dimension == 0 || expected <= most_size, "fastseg::", op, ": ", named.name, " has size ", expected,
                    " in dimension ", dimension, "; allowed: up to 2^30");
    }
    contiguous = contiguous && named.tensor.is_contiguous();
    channels_last = channels_last && is_channels_last(named.tensor);
  }
  FASTSEG_CHECK(contiguous || channels_last, "fastseg::", op,
                ": the tensors must be all contiguous or all channels_last");
  const int64_t images = plane.tensor.size(0), channels = plane.tensor.size(1);
  PoolShape shape;
  shape.rows = make_axis(arguments, 0, plane.tensor.size(2), first.size(2));
  shape.columns = make_axis(arguments, 1, plane.tensor.size(3), first.size(3));
  shape.channels_last = !contiguous;
  shape.outer = contiguous ? images * channels : images;
  shape.inner = contiguous ? 1 : static_cast<int>(channels);
  return shape;
}

inline void check_same_dtype(const char* op, NamedTensor one, NamedTensor other) {
  FASTSEG_CHECK(one.tensor.scalar_type() == other.tensor.scalar_type(), "fastseg::", op, ": ", one.name, " and ",
                other.name, " differ in dtype");
}

inline void check_windows(const char* op, const PoolShape& shape) {
  FASTSEG_CHECK(shape.has_windows(), "fastseg::", op,
                ": kernel_size, stride, padding and dilation must be pairs of windows within 2^30 elements");
}

// Compact indices are uint8.
inline bool holds_compact_indices(const char* op, const Tensor& indices) {
  const ScalarType type = indices.scalar_type();
  FASTSEG_CHECK(type == ScalarType::Long || type == ScalarType::Byte, "fastseg::", op,
                ": indices must be int64 or uint8");
  return type == ScalarType::Byte;
}

// Checks that the number of taps of a window fits the type of the indices.
inline void check_taps(const char* op, const PoolShape& shape, bool compact) {
  const int64_t taps = static_cast<int64_t>(shape.rows.kernel) * shape.columns.kernel;
  FASTSEG_CHECK(taps <= (compact ? 255 : INT32_MAX), "fastseg::", op, ": windows of ", taps,
                " elements; allowed: 255 with uint8 indices, 2^31 - 1 with int64 indices");
}

// Only compact indices need windows: flat ones are positions.
inline void check_geometry(const char* op, const PoolShape& shape, bool compact) {
  if (!compact) return;
  check_windows(op, shape);
  check_taps(op, shape, compact);
}

}  // namespace fastseg::cuda
