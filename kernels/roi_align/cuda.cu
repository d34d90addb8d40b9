// roi_align on CUDA, over the levels of a pyramid, and its gradient. See README.md and cuda_boxes.h.
#include "roi_align/cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/cell_walk.h"
#include "roi_align/cuda_boxes.h"
#include "roi_align/cuda_channels.h"

namespace fastseg::cuda {
namespace {

// ---- forward: a thread takes a bin in `width` channels ----

template <typename scalar_t, int width, bool packed>
__global__ void __launch_bounds__(cell_threads)
    roi_align_forward_kernel(CellGrid grid,  // [K, PH, PW, blocks] if packed, else [K * blocks, PH, PW, 1]
                             Pyramid<const scalar_t> input, const float* __restrict__ boxes, MapView<scalar_t> output,
                             BoxSampling sampling, int blocks) {
  const int channels = input.channels;
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t k = packed ? at.outer : at.outer / blocks;
    const int channel = (packed ? at.group : static_cast<int>(at.outer - k * blocks)) * width;
    const BoxGrid box = box_grid(boxes + 5 * k, input, sampling, output.height, output.width);
    float sums[width] = {};
    if (!box.is_empty()) {
      const MapView<const scalar_t>& map = input.maps[box.level];
      const int64_t channel_step = map.channel_step(channels), pixel_step = map.pixel_step(channels);
      const scalar_t* image = map.data + box.image * channels * map.pixels() + channel * channel_step;
      const roi::Range down = box.rows.between(at.row, -1, map.height);
      const roi::Range right = box.columns.between(at.column, -1, map.width);
      for (int64_t i = down.first; i < down.end; ++i) {
        const auto y = box.rows.sample(at.row, i);
        if (!y.inside) continue;
        const scalar_t* upper = image + static_cast<int64_t>(y.low) * map.width * pixel_step;
        const scalar_t* lower = y.upper > 0 ? upper + map.width * pixel_step : upper;
        float line[width] = {};  // sums one row of samples: a single chain of thousands would round too often
        for (int64_t j = right.first; j < right.end; ++j) {
          const auto x = box.columns.sample(at.column, j);
          if (!x.inside) continue;
          const int64_t left_cell = x.low * pixel_step, right_cell = x.upper > 0 ? left_cell + pixel_step : left_cell;
          // A tap of weight 0 reads a cell that counts anyway: no load outside, and no NaN from another cell.
          const scalar_t* cells[4] = {upper + left_cell, upper + right_cell, lower + left_cell, lower + right_cell};
          const float weights[4] = {(1 - y.upper) * (1 - x.upper), (1 - y.upper) * x.upper, y.upper * (1 - x.upper),
                                    y.upper * x.upper};
#pragma unroll
          for (int tap = 0; tap < 4; ++tap) {
            float values[width];
            load_channels<width, packed>(cells[tap], channel_step, channels - channel, values);
#pragma unroll
            for (int c = 0; c < width; ++c) line[c] += weights[tap] * values[c];
          }
        }
#pragma unroll
        for (int c = 0; c < width; ++c) sums[c] += line[c];
      }
      const float share = 1 / (box.rows.samples * box.columns.samples);
#pragma unroll
      for (int c = 0; c < width; ++c) sums[c] *= share;
    }
    const int64_t channel_step = output.channel_step(channels), pixel_step = output.pixel_step(channels);
    const int64_t bin = static_cast<int64_t>(at.row) * output.width + at.column;
    scalar_t* to = output.data + k * channels * output.pixels() + channel * channel_step + bin * pixel_step;
    store_channels<width, packed>(to, channel_step, channels - channel, sums);
  }
}

// ---- backward: a block takes a tile of cells and loops over the boxes that touch it ----

constexpr int bin_chunk = 32;  // bins along an axis whose weights are in shared memory at a time

// Packed: a lane takes `width` of 32 * width channels and the 8 cells of its warp's row. Else it takes one of 32 cells
// of that row, in `width` channels.
template <typename scalar_t, int width, bool packed>
__global__ void __launch_bounds__(tile_threads, 2)  // without the 2, ptxas spills to stay below 80 registers
    roi_align_backward_kernel(MapView<const scalar_t> grad_output, const float* __restrict__ boxes,
                              Pyramid<scalar_t> grad_input, BoxSampling sampling, int64_t tiles) {
  constexpr int tile_columns = packed ? 8 : 32, cells = packed ? tile_columns : 1;
  FASTSEG_SHARED(int, list, [tile_threads]);
  FASTSEG_SHARED(int, counts, [tile_threads / 32]);
  FASTSEG_SHARED(float, row_weights, [tile_rows][bin_chunk]);
  FASTSEG_SHARED(float, column_weights, [bin_chunk][tile_columns + 1]);
  const Tiling<scalar_t> tiling{tile_rows, tile_columns, packed ? 32 * width : width};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = grad_input.channels;
  const int bin_rows = grad_output.height, bin_columns = grad_output.width;
  const int64_t grad_channel_step = grad_output.channel_step(channels);
  const int64_t grad_bin_step = grad_output.pixel_step(channels);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tiling.at(grad_input, index);
    const int channel = tile.first_channel + (packed ? lane * width : 0), count = channels - channel;
    float sums[cells][width] = {};
    for (int64_t first = 0; first < sampling.boxes; first += tile_threads) {
      const int64_t own = first + threadIdx.x;
      bool touches = false;
      if (own < sampling.boxes) {
        const BoxGrid box = box_grid(boxes + 5 * own, grad_input, sampling, bin_rows, bin_columns);
        touches = !box.is_empty() && box.level == tile.level && box.image == tile.image &&
                  may_touch(box.rows, bin_rows, tile.top, tile_rows) &&
                  may_touch(box.columns, bin_columns, tile.left, tile_columns);
      }
      const int listed = list_in_order<tile_threads>(touches, threadIdx.x, list, counts);
      for (int entry = 0; entry < listed; ++entry) {
        const int64_t k = first + list[entry];
        const BoxGrid box = box_grid(boxes + 5 * k, grad_input, sampling, bin_rows, bin_columns);
        const scalar_t* bins = grad_output.data + k * channels * grad_output.pixels() + channel * grad_channel_step;
        for (int p0 = 0; p0 < bin_rows; p0 += bin_chunk) {
          for (int q0 = 0; q0 < bin_columns; q0 += bin_chunk) {
            __syncthreads();  // the last weights have been read
            const float row_weight = p0 + lane < bin_rows ? box.rows.weight(p0 + lane, tile.top + warp) : 0.0f;
            row_weights[warp][lane] = row_weight;
            for (int x = warp; x < tile_columns; x += tile_rows) {
              column_weights[lane][x] = q0 + lane < bin_columns ? box.columns.weight(q0 + lane, tile.left + x) : 0.0f;
            }
            const unsigned rows = __ballot_sync(~0u, row_weight != 0);
            __syncthreads();
            if (rows == 0) continue;
            bool any = false;
            if constexpr (packed) {  // whether the lane's bin touches the tile
              for (int x = 0; x < tile_columns; ++x) any = any || column_weights[lane][x] != 0;
            }
            unsigned columns = __ballot_sync(~0u, any);
            if constexpr (!packed) {  // which bins touch the lane's cell
              for (int q = 0; q < bin_chunk; ++q) columns |= (column_weights[q][lane] != 0 ? 1u : 0u) << q;
            }
            if (packed && count <= 0) continue;
            for (; columns != 0; columns &= columns - 1) {
              const int q = __ffs(static_cast<int>(columns)) - 1;
              float line[width] = {};
              for (unsigned left = rows; left != 0; left &= left - 1) {
                const int p = __ffs(static_cast<int>(left)) - 1;
                const int64_t bin = static_cast<int64_t>(p0 + p) * bin_columns + q0 + q;
                float values[width];
                load_channels<width, packed>(bins + bin * grad_bin_step, grad_channel_step, count, values);
#pragma unroll
                for (int c = 0; c < width; ++c) line[c] += row_weights[warp][p] * values[c];
              }
#pragma unroll
              for (int x = 0; x < cells; ++x) {
                const float weight = column_weights[q][packed ? x : lane];
                if (weight == 0) continue;  // 0 times NaN would be NaN
#pragma unroll
                for (int c = 0; c < width; ++c) sums[x][c] += weight * line[c];
              }
            }
          }
        }
      }
    }
    const MapView<scalar_t>& map = grad_input.maps[tile.level];
    const int y = tile.top + warp;
    if (y >= map.height || count <= 0) continue;
    const int64_t channel_step = map.channel_step(channels), pixel_step = map.pixel_step(channels);
    scalar_t* to = map.data + tile.image * channels * map.pixels() + channel * channel_step;
#pragma unroll
    for (int i = 0; i < cells; ++i) {
      const int x = tile.left + (packed ? i : lane);
      if (x >= map.width) continue;
      const int64_t pixel = static_cast<int64_t>(y) * map.width + x;
      store_channels<width, packed>(to + pixel * pixel_step, channel_step, count, sums[i]);
    }
  }
}

// ---- launches ----

template <int width, bool packed, typename scalar_t>
cudaError_t launch_forward(const Pyramid<const scalar_t>& input, const float* boxes, const MapView<scalar_t>& output,
                           const BoxSampling& sampling, cudaStream_t stream) {
  const int blocks = (input.channels + width - 1) / width;
  const Cells cells = packed ? Cells{sampling.boxes, output.height, output.width, blocks}
                             : Cells{sampling.boxes * blocks, output.height, output.width, 1};
  return launch_over_cells(cells, stream, roi_align_forward_kernel<scalar_t, width, packed>, input, boxes, output,
                           sampling, blocks);
}

template <int width, bool packed, typename scalar_t>
cudaError_t launch_backward(const MapView<const scalar_t>& grad_output, const float* boxes,
                            const Pyramid<scalar_t>& grad_input, const BoxSampling& sampling, cudaStream_t stream) {
  constexpr int64_t most = 1 << 30;
  const Tiling<scalar_t> tiling{tile_rows, packed ? 8 : 32, packed ? 32 * width : width};
  const int64_t tiles = tiling.count(grad_input);
  if (tiles == 0) return cudaSuccess;
  FASTSEG_LAUNCH((roi_align_backward_kernel<scalar_t, width, packed>),
                 dim3(static_cast<unsigned>(tiles < most ? tiles : most)), dim3(tile_threads), 0, stream, grad_output,
                 boxes, grad_input, sampling, tiles);
  return cudaGetLastError();
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_roi_align_forward(const Pyramid<const scalar_t>& input, const float* boxes,
                                     const MapView<scalar_t>& output, const BoxSampling& sampling,
                                     cudaStream_t stream) {
  constexpr int width = 16 / sizeof(scalar_t);
  return holds_channel_packs<width>(input, output) ? launch_forward<width, true>(input, boxes, output, sampling, stream)
                                                   : launch_forward<4, false>(input, boxes, output, sampling, stream);
}

template <typename scalar_t>
cudaError_t launch_roi_align_backward(const MapView<const scalar_t>& grad_output, const float* boxes,
                                      const Pyramid<scalar_t>& grad_input, const BoxSampling& sampling,
                                      cudaStream_t stream) {
  return holds_channel_packs<4>(grad_input, grad_output)
             ? launch_backward<4, true>(grad_output, boxes, grad_input, sampling, stream)
             : launch_backward<8, false>(grad_output, boxes, grad_input, sampling, stream);
}

#define INSTANTIATE(scalar_t)                                                                                \
  template cudaError_t launch_roi_align_forward(const Pyramid<const scalar_t>&, const float*,                \
                                                const MapView<scalar_t>&, const BoxSampling&, cudaStream_t); \
  template cudaError_t launch_roi_align_backward(const MapView<const scalar_t>&, const float*,               \
                                                 const Pyramid<scalar_t>&, const BoxSampling&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace fastseg::cuda
