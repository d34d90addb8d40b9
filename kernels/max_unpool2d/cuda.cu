// Max unpooling on CUDA, forward and backward. See README.md, and pooling/cuda_shape.h for layouts and indices.
#include "max_unpool2d/cuda.h"

#include "cuda/pack.h"
#include "max_unpool2d/cuda_scatter.h"

namespace fastseg::cuda {
namespace {

// A 2 x 2 window of a plane [height, width], by its upper left corner, which lies inside.
struct Quad {
  int row, column;
  int height, width;

  __device__ bool has_tap(int tap) const {
    return tap >= 0 && tap < 4 && row + tap / 2 < height && column + tap % 2 < width;
  }

  // The tap that an index means, -1 if it points nowhere. *misplaced, if there, is raised where it points at the
  // plane but not at this window.
  __device__ int tap_of(uint8_t index, unsigned*) const { return has_tap(index) ? index : -1; }
  __device__ int tap_of(int64_t index, unsigned* misplaced) const {
    const int64_t first = static_cast<int64_t>(row) * width + column;
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      if (has_tap(tap) && index == first + tap / 2 * static_cast<int64_t>(width) + tap % 2) return tap;
    }
    const bool in_plane = index >= 0 && index < static_cast<int64_t>(height) * width;
    if (in_plane && misplaced != nullptr) atomicOr(misplaced, 1u);
    return -1;
  }
};

// Contiguous planes tiled by 2 x 2 windows: a thread expands `width` of them into two rows of 2 * width elements. A
// row more than the windows cover is cleared.
template <typename element_t, typename index_t, int width>
__global__ void __launch_bounds__(cell_threads)
    place_rows_kernel(CellGrid grid,                        // over [planes, (H + 1) / 2, 1, PW / width]
                      const element_t* __restrict__ input,  // [planes, PH, PW]
                      const index_t* __restrict__ indices,  // [planes, PH, PW]
                      element_t* __restrict__ output,       // [planes, H, 2 * PW]
                      int height, int window_rows, int window_columns, unsigned* misplaced) {
  const int64_t line_size = 2 * static_cast<int64_t>(window_columns);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int first_window = at.group * width, top = 2 * at.row;
    Pack<element_t, 2 * width> upper{}, lower{};
    if (at.row < window_rows) {
      const int64_t window = (at.outer * window_rows + at.row) * window_columns + first_window;
      const auto values = load_pack<width>(input + window);
      const auto index = load_pack<width>(indices + window);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const Quad quad{top, 2 * (first_window + k), height, 2 * window_columns};
        const int tap = quad.tap_of(index.values[k], misplaced);
        upper.values[2 * k] = tap == 0 ? values.values[k] : element_t{0};
        upper.values[2 * k + 1] = tap == 1 ? values.values[k] : element_t{0};
        lower.values[2 * k] = tap == 2 ? values.values[k] : element_t{0};
        lower.values[2 * k + 1] = tap == 3 ? values.values[k] : element_t{0};
      }
    }
    element_t* line = output + (at.outer * height + top) * line_size + 2 * first_window;
    store_pack<2 * width>(line, upper);
    if (top + 1 < height) store_pack<2 * width>(line + line_size, lower);
  }
}

// The same for `width` channels of one window, with sizes that the windows need not divide.
template <typename element_t, typename index_t, int width>
__global__ void __launch_bounds__(cell_threads)
    place_pixels_kernel(CellGrid grid,                        // over [outer, (H + 1) / 2, (W + 1) / 2, inner / width]
                        const element_t* __restrict__ input,  // [outer, PH, PW, inner]
                        const index_t* __restrict__ indices,  // [outer, PH, PW, inner]
                        element_t* __restrict__ output,       // [outer, H, W, inner]
                        Axis rows, Axis columns, int inner, unsigned* misplaced) {
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t channel = static_cast<int64_t>(at.group) * width;
    const Quad quad{2 * at.row, 2 * at.column, rows.size, columns.size};
    Pack<element_t, width> values{};
    int taps[width];
    const bool is_window = at.row < rows.windows && at.column < columns.windows;
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + at.column;
    if (is_window) {
      values = load_pack<width>(input + window * inner + channel);
      const auto index = load_pack<width>(indices + window * inner + channel);
#pragma unroll
      for (int k = 0; k < width; ++k) taps[k] = quad.tap_of(index.values[k], misplaced);
    }
    const int64_t line = at.outer * rows.size + quad.row;
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      if (!quad.has_tap(tap)) continue;
      Pack<element_t, width> placed;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        placed.values[k] = is_window && taps[k] == tap ? values.values[k] : element_t{0};
      }
      const int64_t pixel = (line + tap / 2) * columns.size + quad.column + tap % 2;
      store_pack<width>(output + pixel * inner + channel, placed);
    }
  }
}

// Contiguous planes tiled by 2 x 2 windows, compact indices: a thread reads two rows of 2 * width elements, all of
// whose sectors hold some window's element anyway, and keeps `width`.
template <typename element_t, int width>
__global__ void __launch_bounds__(cell_threads)
    collect_rows_kernel(CellGrid grid,                              // over [planes, PH, 1, PW / width]
                        const element_t* __restrict__ grad_output,  // [planes, H, 2 * PW]
                        const uint8_t* __restrict__ indices,        // [planes, PH, PW]
                        element_t* __restrict__ grad_input,         // [planes, PH, PW]
                        int height, int window_rows, int window_columns) {
  const int64_t line_size = 2 * static_cast<int64_t>(window_columns);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int first_window = at.group * width, top = 2 * at.row;
    const int64_t window = (at.outer * window_rows + at.row) * window_columns + first_window;
    const element_t* line = grad_output + (at.outer * height + top) * line_size + 2 * first_window;
    const auto index = load_pack<width>(indices + window);
    const auto upper = load_pack<2 * width>(line);
    Pack<element_t, 2 * width> lower{};
    if (top + 1 < height) lower = load_pack<2 * width>(line + line_size);
    Pack<element_t, width> collected{};
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int tap = index.values[k];
      if (tap == 0) collected.values[k] = upper.values[2 * k];
      if (tap == 1) collected.values[k] = upper.values[2 * k + 1];
      if (tap == 2) collected.values[k] = lower.values[2 * k];
      if (tap == 3) collected.values[k] = lower.values[2 * k + 1];
    }
    store_pack<width>(grad_input + window, collected);
  }
}

// The same for `width` channels of one window.
template <typename element_t, int width>
__global__ void __launch_bounds__(cell_threads)
    collect_pixels_kernel(CellGrid grid,                              // over [outer, PH, PW, inner / width]
                          const element_t* __restrict__ grad_output,  // [outer, H, W, inner]
                          const uint8_t* __restrict__ indices,        // [outer, PH, PW, inner]
                          element_t* __restrict__ grad_input,         // [outer, PH, PW, inner]
                          Axis rows, Axis columns, int inner) {
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t channel = static_cast<int64_t>(at.group) * width;
    const Quad quad{2 * at.row, 2 * at.column, rows.size, columns.size};
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + at.column;
    const auto index = load_pack<width>(indices + window * inner + channel);
    const int64_t line = at.outer * rows.size + quad.row;
    Pack<element_t, width> collected{};
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) {
      if (!quad.has_tap(tap)) continue;
      const int64_t pixel = (line + tap / 2) * columns.size + quad.column + tap % 2;
      const auto values = load_pack<width>(grad_output + pixel * inner + channel);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (index.values[k] == tap) collected.values[k] = values.values[k];
      }
    }
    store_pack<width>(grad_input + window * inner + channel, collected);
  }
}

// Any geometry: a thread follows `width` neighbouring indices, which are channels of a window, or windows of a row in
// contiguous planes with flat indices.
template <typename element_t, typename index_t, int width>
__global__ void __launch_bounds__(cell_threads)
    pick_kernel(CellGrid grid,  // over [outer, PH, PW, inner / width] or [planes, PH, 1, PW / width]
                const element_t* __restrict__ grad_output,  // [outer, H, W, inner]
                const index_t* __restrict__ indices,        // [outer, PH, PW, inner]
                element_t* __restrict__ grad_input,         // [outer, PH, PW, inner]
                Axis rows, Axis columns, int inner) {
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t first = static_cast<int64_t>(at.group) * width;
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + at.column;
    const element_t* plane = grad_output + at.outer * rows.size * columns.size * inner;
    if (inner > 1) plane += first;
    const auto index = load_pack<width>(indices + window * inner + first);
    Pack<element_t, width> picked;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int64_t position = position_of(index.values[k], rows, columns, at.row, at.column);
      const element_t* channel = inner > 1 ? plane + k : plane;
      picked.values[k] = position < 0 ? element_t{0} : channel[position * inner];
    }
    store_pack<width>(grad_input + window * inner + first, picked);
  }
}

// ---- launches ----

template <int width, typename element_t, typename index_t>
cudaError_t launch_place_pixels(const element_t* input, const index_t* indices, element_t* output,
                                const PoolShape& shape, unsigned* misplaced, cudaStream_t stream) {
  const Cells cells{shape.outer, (shape.rows.size + 1) / 2, (shape.columns.size + 1) / 2, shape.inner / width};
  return launch_over_cells(cells, stream, place_pixels_kernel<element_t, index_t, width>, input, indices, output,
                           shape.rows, shape.columns, shape.inner, misplaced);
}

// With the widest packs that rows and pointers are aligned for.
template <int width, typename element_t, typename index_t>
cudaError_t launch_place_rows(const element_t* input, const index_t* indices, element_t* output, const PoolShape& shape,
                              unsigned* misplaced, cudaStream_t stream) {
  const bool aligned = shape.columns.windows % width == 0 && holds_packs<width>(input) && holds_packs<width>(indices) &&
                       holds_packs<2 * width>(output);
  if (aligned) {
    const Cells cells{shape.outer, (shape.rows.size + 1) / 2, 1, shape.columns.windows / width};
    return launch_over_cells(cells, stream, place_rows_kernel<element_t, index_t, width>, input, indices, output,
                             shape.rows.size, shape.rows.windows, shape.columns.windows, misplaced);
  }
  if constexpr (width > 1) {
    return launch_place_rows<width / 2>(input, indices, output, shape, misplaced, stream);
  } else {
    return launch_place_pixels<1>(input, indices, output, shape, misplaced, stream);
  }
}

// Of 2 x 2 windows side by side. Indices that point outside their window point nowhere.
template <typename element_t, typename index_t>
cudaError_t launch_place(const element_t* input, const index_t* indices, element_t* output, const PoolShape& shape,
                         unsigned* misplaced, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(element_t);
  if (shape.has_whole_rows_of_two()) {
    return launch_place_rows<width / 2>(input, indices, output, shape, misplaced, stream);
  }
  const bool packs = shape.has_packs<width>() && holds_packs<width>(input) && holds_packs<width>(indices) &&
                     holds_packs<width>(output);
  return packs ? launch_place_pixels<width>(input, indices, output, shape, misplaced, stream)
               : launch_place_pixels<1>(input, indices, output, shape, misplaced, stream);
}

template <int width, typename element_t>
cudaError_t launch_collect_pixels(const element_t* grad_output, const uint8_t* indices, element_t* grad_input,
                                  const PoolShape& shape, cudaStream_t stream) {
  const Cells cells{shape.outer, shape.rows.windows, shape.columns.windows, shape.inner / width};
  return launch_over_cells(cells, stream, collect_pixels_kernel<element_t, width>, grad_output, indices, grad_input,
                           shape.rows, shape.columns, shape.inner);
}

template <int width, typename element_t>
cudaError_t launch_collect_rows(const element_t* grad_output, const uint8_t* indices, element_t* grad_input,
                                const PoolShape& shape, cudaStream_t stream) {
  const bool aligned = shape.columns.windows % width == 0 && holds_packs<2 * width>(grad_output) &&
                       holds_packs<width>(indices) && holds_packs<width>(grad_input);
  if (aligned) {
    const Cells cells{shape.outer, shape.rows.windows, 1, shape.columns.windows / width};
    return launch_over_cells(cells, stream, collect_rows_kernel<element_t, width>, grad_output, indices, grad_input,
                             shape.rows.size, shape.rows.windows, shape.columns.windows);
  }
  if constexpr (width > 1) {
    return launch_collect_rows<width / 2>(grad_output, indices, grad_input, shape, stream);
  } else {
    return launch_collect_pixels<1>(grad_output, indices, grad_input, shape, stream);
  }
}

template <int width, typename element_t, typename index_t>
cudaError_t launch_pick(const element_t* grad_output, const index_t* indices, element_t* grad_input,
                        const PoolShape& shape, bool along_row, cudaStream_t stream) {
  const Axis& columns = shape.columns;
  const Cells cells{shape.outer, shape.rows.windows, along_row ? 1 : columns.windows,
                    (along_row ? columns.windows : shape.inner) / width};
  return launch_over_cells(cells, stream, pick_kernel<element_t, index_t, width>, grad_output, indices, grad_input,
                           shape.rows, columns, shape.inner);
}

}  // namespace

template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_forward(const element_t* input, const index_t* indices, element_t* output,
                                        const PoolShape& shape, unsigned* misplaced, cudaStream_t stream) {
  if (!shape.is_tiled_by_two()) return launch_scatter(input, indices, output, shape, nullptr, stream);
  if (misplaced == nullptr) return launch_place(input, indices, output, shape, nullptr, stream);
  if (cudaError_t error = cudaMemsetAsync(misplaced, 0, sizeof(unsigned), stream)) return error;
  if (cudaError_t error = launch_place(input, indices, output, shape, misplaced, stream)) return error;
  return launch_scatter(input, indices, output, shape, misplaced, stream);
}

template <typename element_t, typename index_t>
cudaError_t launch_max_unpool2d_backward(const element_t* grad_output, const index_t* indices, element_t* grad_input,
                                         const PoolShape& shape, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(element_t);
  const bool aligned = holds_packs<width>(grad_output) && holds_packs<width>(indices) && holds_packs<width>(grad_input);
  const bool packs = shape.has_packs<width>() && aligned;
  if constexpr (std::is_same_v<index_t, uint8_t>) {
    if (shape.has_whole_rows_of_two()) {
      return launch_collect_rows<width / 2>(grad_output, indices, grad_input, shape, stream);
    }
    if (shape.is_tiled_by_two()) {
      return packs ? launch_collect_pixels<width>(grad_output, indices, grad_input, shape, stream)
                   : launch_collect_pixels<1>(grad_output, indices, grad_input, shape, stream);
    }
  } else if (!shape.channels_last && aligned && shape.columns.windows % width == 0) {
    return launch_pick<width>(grad_output, indices, grad_input, shape, true, stream);
  }
  return packs ? launch_pick<width>(grad_output, indices, grad_input, shape, false, stream)
               : launch_pick<1>(grad_output, indices, grad_input, shape, false, stream);
}

#define INSTANTIATE_FOR(element_t, index_t)                                                                         \
  template cudaError_t launch_max_unpool2d_forward(const element_t*, const index_t*, element_t*, const PoolShape&,  \
                                                   unsigned*, cudaStream_t);                                        \
  template cudaError_t launch_max_unpool2d_backward(const element_t*, const index_t*, element_t*, const PoolShape&, \
                                                    cudaStream_t);
#define INSTANTIATE(element_t)        \
  INSTANTIATE_FOR(element_t, int64_t) \
  INSTANTIATE_FOR(element_t, uint8_t)
INSTANTIATE(uint16_t)
INSTANTIATE(uint32_t)
INSTANTIATE(uint64_t)

}  // namespace fastseg::cuda
