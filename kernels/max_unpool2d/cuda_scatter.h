// Unpooling by flat indices that are not where their windows are: finding out, and the slower way that takes any index.
#pragma once

#include "max_pool2d/cuda_windows.h"

namespace fastseg::cuda {
namespace {

constexpr int scatter_threads = 1024;

// Raises *misplaced if an index points at the plane but not at its own window.
__global__ void __launch_bounds__(cell_threads)
    find_misplaced_kernel(CellGrid grid,                         // over [outer, PH, PW, inner]
                          const int64_t* __restrict__ indices,   // [outer, PH, PW, inner]
                          Axis row_axis, Axis column_axis, int inner, unsigned* misplaced) {
  const WindowAxis<0, 0> rows(row_axis), columns(column_axis);
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t window = (at.outer * rows.windows + at.row) * columns.windows + at.column;
    const int64_t index = indices[window * inner + at.group];
    if (index < 0 || index >= static_cast<int64_t>(rows.size) * columns.size) continue;
    const int row = static_cast<int>(index / columns.size);
    const int column = static_cast<int>(index - static_cast<int64_t>(row) * columns.size);
    if (rows.tap_of(at.row, row) < 0 || columns.tap_of(at.column, column) < 0) atomicOr(misplaced, 1u);
  }
}

// *element = after(*element), while other threads do the same.
template <typename element_t, typename After>
__device__ void update(element_t* element, const After& after) {
  using long_t = std::conditional_t<sizeof(element_t) == 8, unsigned long long, unsigned>;
  using word_t = std::conditional_t<sizeof(element_t) == 2, unsigned short, long_t>;
  auto* word = reinterpret_cast<word_t*>(element);
  word_t expected = 0;
  for (;;) {
    const word_t found = atomicCAS(word, expected, static_cast<word_t>(after(expected)));
    if (found == expected) return;
    expected = found;
  }
}

// Flat indices that may point anywhere: a block takes a plane, clears it and copies its inputs in row-major order, one
// per thread and round. Where several of a round point at one element, that element first serves to find the last of
// them. Returns at once unless *misplaced is raised or null.
template <typename element_t>
__global__ void __launch_bounds__(scatter_threads)
    scatter_kernel(const element_t* __restrict__ input,    // [outer, sources, inner]
                   const int64_t* __restrict__ indices,    // [outer, sources, inner]
                   element_t* output,                      // [outer, targets, inner]
                   int64_t outer, int64_t sources, int64_t targets, int inner, const unsigned* misplaced) {
  if (misplaced != nullptr && *misplaced == 0) return;
  for (int64_t plane = blockIdx.x; plane < outer * inner; plane += gridDim.x) {
    const int64_t image = plane / inner, channel = plane - image * inner;
    const int64_t first_source = image * sources * inner + channel;
    element_t* to = output + image * targets * inner + channel;
    for (int64_t i = threadIdx.x; i < targets; i += blockDim.x) to[i * inner] = 0;
    __syncthreads();
    for (int64_t first = 0; first < sources; first += blockDim.x) {
      const int64_t source = first + threadIdx.x;
      int64_t target = -1;
      if (source < sources) target = indices[first_source + source * inner];
      const bool copies = target >= 0 && target < targets;
      element_t* element = to + (copies ? target : 0) * inner;
      const element_t mark = static_cast<element_t>(threadIdx.x + 1);
      if (copies) update(element, [](element_t) { return element_t{0}; });
      __syncthreads();
      if (copies) update(element, [=](element_t before) { return before < mark ? mark : before; });
      __syncthreads();
      const bool is_last = copies && *element == mark;
      __syncthreads();
      if (is_last) *element = input[first_source + source * inner];
      __syncthreads();
    }
  }
}

cudaError_t launch_find_misplaced(const int64_t* indices, const PoolShape& shape, unsigned* misplaced,
                                  cudaStream_t stream) {
  const Cells cells{shape.outer, shape.rows.windows, shape.columns.windows, shape.inner};
  return launch_over_cells(cells, stream, find_misplaced_kernel, indices, shape.rows, shape.columns, shape.inner,
                           misplaced);
}

template <typename element_t>
cudaError_t launch_scatter(const element_t* input, const int64_t* indices, element_t* output,
                           const PoolShape& shape, const unsigned* misplaced, cudaStream_t stream) {
  return launch_over_planes(shape, scatter_threads, stream, scatter_kernel<element_t>, input, indices, output,
                            shape.outer, shape.window_count(), shape.element_count(), shape.inner, misplaced);
}

}  // namespace
}  // namespace fastseg::cuda
