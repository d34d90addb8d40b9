// Unpooling with arbitrary indices: a block takes a plane.
#pragma once

#include "cuda/cell_walk.h"
#include "pooling/cuda_shape.h"

namespace fastseg::cuda {
namespace {

constexpr int scatter_threads = 1024;

// The element of the plane that an index of window (row, column) points at, -1 if none.
__device__ int64_t position_of(int64_t index, const Axis& rows, const Axis& columns, int, int) {
  return index >= 0 && index < static_cast<int64_t>(rows.size) * columns.size ? index : -1;
}
__device__ int64_t position_of(uint8_t index, const Axis& rows, const Axis& columns, int row, int column) {
  const int row_tap = index / columns.kernel, column_tap = index % columns.kernel;
  const int y = row * rows.stride - rows.padding + row_tap * rows.dilation;
  const int x = column * columns.stride - columns.padding + column_tap * columns.dilation;
  const bool inside = row_tap < rows.kernel && y >= 0 && y < rows.size && x >= 0 && x < columns.size;
  return inside ? static_cast<int64_t>(y) * columns.size + x : -1;
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

// A block takes a plane, clears it and copies its inputs in row-major order, one per thread and round. If several
// inputs of a round have one target, the target's memory is first used to find the last of them. Returns at once unless
// *misplaced is set or `misplaced` is null.
template <typename element_t, typename index_t>
__global__ void __launch_bounds__(scatter_threads)
    scatter_kernel(const element_t* __restrict__ input,  // [outer, sources, inner]
                   const index_t* __restrict__ indices,  // [outer, sources, inner]
                   element_t* output,                    // [outer, targets, inner]
                   int64_t outer, Axis rows, Axis columns, int inner, const unsigned* misplaced) {
  if (misplaced != nullptr && *misplaced == 0) return;
  const int64_t sources = static_cast<int64_t>(rows.windows) * columns.windows;
  const int64_t targets = static_cast<int64_t>(rows.size) * columns.size;
  for (int64_t plane = blockIdx.x; plane < outer * inner; plane += gridDim.x) {
    const int64_t image = plane / inner, channel = plane - image * inner;
    const int64_t first_source = image * sources * inner + channel;
    element_t* to = output + image * targets * inner + channel;
    for (int64_t i = threadIdx.x; i < targets; i += blockDim.x) to[i * inner] = 0;
    __syncthreads();
    for (int64_t first = 0; first < sources; first += blockDim.x) {
      const int64_t source = first + threadIdx.x;
      int64_t target = -1;
      if (source < sources) {
        const int row = static_cast<int>(source / columns.windows);
        const int column = static_cast<int>(source - static_cast<int64_t>(row) * columns.windows);
        target = position_of(indices[first_source + source * inner], rows, columns, row, column);
      }
      const bool copies = target >= 0;
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

template <typename element_t, typename index_t>
cudaError_t launch_scatter(const element_t* input, const index_t* indices, element_t* output, const PoolShape& shape,
                           const unsigned* misplaced, cudaStream_t stream) {
  return launch_over_planes(shape.outer * shape.inner, scatter_threads, stream, scatter_kernel<element_t, index_t>,
                            input, indices, output, shape.outer, shape.rows, shape.columns, shape.inner, misplaced);
}

}  // namespace
}  // namespace fastseg::cuda
