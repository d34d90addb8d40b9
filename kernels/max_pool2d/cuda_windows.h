// Positions of the windows of a pooling, and the kernel that sums over the windows that cover an element.
#pragma once

#include <type_traits>

#include "cuda/accumulate.h"
#include "cuda/cell_walk.h"
#include "cuda/pack.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {

// An axis with kernel and stride fixed at compile time and dilation 1; with zeros they are read from the axis.
template <int fixed_kernel, int fixed_stride>
struct WindowAxis : Axis {
  static constexpr bool fixed = fixed_kernel > 0;
  static constexpr int most_windows = fixed ? (fixed_kernel + fixed_stride - 1) / (fixed ? fixed_stride : 1) : 0;

  __device__ explicit WindowAxis(const Axis& axis) : Axis(axis) {}

  __device__ int kernel_size() const { return fixed ? fixed_kernel : kernel; }
  __device__ int step() const { return fixed ? fixed_stride : stride; }
  __device__ int spread() const { return fixed ? 1 : dilation; }

  __device__ int start(int window) const { return window * step() - padding; }
  __device__ bool holds(int position) const { return position >= 0 && position < size; }

  // The first tap, of a window starting at `start`, that is not in the padding before the plane.
  __device__ int first_tap(int start) const { return start < 0 ? (spread() - 1 - start) / spread() : 0; }

  // Only windows [first, first + count) can cover `position`; tap_of() gives the tap, if any.
  __device__ int first_window(int position) const {
    if constexpr (fixed) {
      return (position + padding) / fixed_stride - (most_windows - 1);
    } else {
      const int before = position + padding - (kernel - 1) * dilation;
      return before <= 0 ? 0 : (before + stride - 1) / stride;
    }
  }
  __device__ int window_count(int position, int first) const {
    if constexpr (fixed) return most_windows;
    else return min((position + padding) / stride, windows - 1) - first + 1;
  }

  // The tap of `window` at `position`, or -1.
  __device__ int tap_of(int window, int position) const {
    const int distance = position - start(window);
    if (window < 0 || window >= windows || distance < 0) return -1;
    const int tap = distance / spread();
    return tap < kernel_size() && tap * spread() == distance ? tap : -1;
  }
};

// The index of a window for its tap `tap`, which lies at `position`.
template <typename index_t>
__device__ auto wanted_index(int tap, int64_t position) {
  if constexpr (std::is_same_v<index_t, uint8_t>) return tap;
  else return position;
}

// Every element of the large plane is the sum of the gradients whose index it is, in row-major order of the windows,
// and is written once.
template <typename scalar_t, typename index_t, int width, int fixed_kernel, int fixed_stride>
__global__ void __launch_bounds__(cell_threads, 5)           // without the 5, ptxas spills to stay below 32 registers
    gather_kernel(CellGrid grid,                             // over [outer, H, W, inner / width]
                  const scalar_t* __restrict__ grad_output,  // [outer, PH, PW, inner]
                  const index_t* __restrict__ indices,       // [outer, PH, PW, inner]
                  scalar_t* __restrict__ grad_input,         // [outer, H, W, inner]
                  Axis row_axis, Axis column_axis, int inner) {
  using value_t = accumulate_t<scalar_t>;
  constexpr int unrolled = fixed_kernel > 0 ? fixed_kernel : 1;
  const WindowAxis<fixed_kernel, fixed_stride> rows(row_axis), columns(column_axis);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    value_t sums[width] = {};
    const int64_t position = static_cast<int64_t>(at.row) * columns.size + at.column;
    const int first_row = rows.first_window(at.row), first_column = columns.first_window(at.column);
    const int row_count = rows.window_count(at.row, first_row);
    const int column_count = columns.window_count(at.column, first_column);
#pragma unroll unrolled
    for (int i = 0; i < row_count; ++i) {
      const int row_tap = rows.tap_of(first_row + i, at.row);
      if (row_tap < 0) continue;
      const int64_t window_row = at.outer * rows.windows + first_row + i;
#pragma unroll unrolled
      for (int j = 0; j < column_count; ++j) {
        const int column_tap = columns.tap_of(first_column + j, at.column);
        if (column_tap < 0) continue;
        const int64_t offset =
            (window_row * columns.windows + first_column + j) * inner + static_cast<int64_t>(at.group) * width;
        const auto index = load_pack<width>(indices + offset);
        const auto value = load_pack<width>(grad_output + offset);
        const auto wanted = wanted_index<index_t>(row_tap * columns.kernel_size() + column_tap, position);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (index.values[k] == wanted) sums[k] += static_cast<value_t>(value.values[k]);
        }
      }
    }
    Pack<scalar_t, width> pack;
#pragma unroll
    for (int k = 0; k < width; ++k) pack.values[k] = static_cast<scalar_t>(sums[k]);
    const int64_t plane = static_cast<int64_t>(rows.size) * columns.size;
    store_pack<width>(grad_input + (at.outer * plane + position) * inner + static_cast<int64_t>(at.group) * width,
                      pack);
  }
}

}  // namespace fastseg::cuda
