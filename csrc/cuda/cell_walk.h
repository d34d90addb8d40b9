// A grid of threads that strides over the cells of a four-dimensional array without dividing at every step.
//
// A thread divides once, for its first cell; there are fewer threads than 2^32. Then it adds the stride,
// which the host has split into the same four digits, with carries. The number of cells is not limited:
// only the last three sizes must be 2^30 or less.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

constexpr int cell_threads = 256;  // per block

struct Cells {
  int64_t outer;
  int rows, columns, groups;
};

struct CellGrid {
  Cells cells;
  Cells stride;  // the threads of the grid, as a distance between cells
};

class CellWalk {
 public:
  int64_t outer;
  int row, column, group;

  __device__ explicit CellWalk(const CellGrid& grid) {
    const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned columns = first / grid.cells.groups;
    const unsigned rows = columns / grid.cells.columns;
    outer = rows / grid.cells.rows;
    row = rows % grid.cells.rows;
    column = columns % grid.cells.columns;
    group = first % grid.cells.groups;
  }

  __device__ bool inside(const CellGrid& grid) const { return outer < grid.cells.outer; }

  __device__ void advance(const CellGrid& grid) {
    group += grid.stride.groups;
    column += grid.stride.columns;
    row += grid.stride.rows;
    outer += grid.stride.outer;
    if (group >= grid.cells.groups) {
      group -= grid.cells.groups;
      ++column;
    }
    if (column >= grid.cells.columns) {
      column -= grid.cells.columns;
      ++row;
    }
    if (row >= grid.cells.rows) {
      row -= grid.cells.rows;
      ++outer;
    }
  }
};

inline cudaError_t count_processors(int& processors) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
}

// Launches kernel(CellGrid, arguments...) on enough blocks to fill the device a few times, so that blocks
// that end early make room for others, or on fewer blocks if there are fewer cells.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_over_cells(const Cells& cells, cudaStream_t stream, void (*kernel)(CellGrid, Parameters...),
                              Arguments... arguments) {
  constexpr int blocks_per_processor = 4 * 2048 / cell_threads;
  const int64_t count = cells.outer * cells.rows * cells.columns * cells.groups;
  if (count == 0) return cudaSuccess;
  int processors = 0;
  if (cudaError_t error = count_processors(processors)) return error;
  const int64_t most = static_cast<int64_t>(processors) * blocks_per_processor;
  const int64_t needed = (count + cell_threads - 1) / cell_threads;
  const int64_t blocks = needed < most ? needed : most;
  const int64_t columns = blocks * cell_threads / cells.groups;
  const int64_t rows = columns / cells.columns;
  const int64_t outer = rows / cells.rows;
  const Cells stride{outer, static_cast<int>(rows - outer * cells.rows),
                     static_cast<int>(columns - rows * cells.columns),
                     static_cast<int>(blocks * cell_threads - columns * cells.groups)};
  FASTSEG_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(cell_threads), 0, stream, CellGrid{cells, stride},
                 arguments...);
  return cudaGetLastError();
}

// Launches kernel(arguments...) with blocks that take a plane at a time, few enough to return quickly if there is
// nothing to do.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_over_planes(int64_t planes, int threads, cudaStream_t stream, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  int processors = 0;
  if (cudaError_t error = count_processors(processors)) return error;
  if (planes == 0) return cudaSuccess;
  const int64_t most = int64_t{4} * processors;
  const unsigned blocks = static_cast<unsigned>(planes < most ? planes : most);
  FASTSEG_LAUNCH(kernel, dim3(blocks), dim3(threads), 0, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace fastseg::cuda
