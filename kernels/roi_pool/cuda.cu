// roi_pool on CUDA and its gradient. See README.md, and roi_align/cuda_boxes.h for tiles and lists of boxes.
#include "roi_pool/cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda/cell_walk.h"
#include "roi_align/cuda_boxes.h"
#include "roi_align/cuda_channels.h"
#include "roi_pool/bins.h"

namespace fastseg::cuda {
namespace {

struct BoxBins {
  int64_t image;  // -1 if there is no such image or the box is not finite
  roi::Bins<float> rows, columns;
};

template <typename element_t>
__device__ BoxBins box_bins(const float* box, const Pyramid<element_t>& map, int bin_rows, int bin_columns) {
  const bool finite = roi::is_box(box[1], box[2], box[3], box[4]);
  return {finite ? roi::image_of(box[0], map.images) : -1,
          roi::make_bins(box[2], box[4], map.scales[0], bin_rows, map.maps[0].height),
          roi::make_bins(box[1], box[3], map.scales[0], bin_columns, map.maps[0].width)};
}

// ---- forward: a thread takes a bin in `width` channels ----

template <typename scalar_t, int width, bool packed>
__global__ void __launch_bounds__(cell_threads)
    roi_pool_forward_kernel(CellGrid grid,  // [K, PH, PW, blocks] if packed, else [K * blocks, PH, PW, 1]
                            Pyramid<const scalar_t> input, const float* __restrict__ boxes, MapView<scalar_t> output,
                            MapView<int32_t> argmax, int blocks) {
  const MapView<const scalar_t>& map = input.maps[0];
  const int channels = input.channels;
  for (CellWalk at(grid); at.inside(grid); at.advance(grid)) {
    const int64_t k = packed ? at.outer : at.outer / blocks;
    const int channel = (packed ? at.group : static_cast<int>(at.outer - k * blocks)) * width;
    const BoxBins box = box_bins(boxes + 5 * k, input, output.height, output.width);
    const int top = box.rows.first(at.row), bottom = box.image < 0 ? top : box.rows.end(at.row);
    const int left = box.columns.first(at.column), right = box.columns.end(at.column);
    const bool any = top < bottom && left < right;
    float best[width];
    int place[width];
#pragma unroll
    for (int c = 0; c < width; ++c) {
      best[c] = any ? -INFINITY : 0.0f;
      place[c] = any ? top * map.width + left : -1;
    }
    const int64_t channel_step = map.channel_step(channels), pixel_step = map.pixel_step(channels);
    const scalar_t* image = map.data + box.image * channels * map.pixels() + channel * channel_step;
    for (int y = top; y < bottom; ++y) {
      for (int x = left; x < right; ++x) {
        const int pixel = y * map.width + x;
        float values[width];
        load_channels<width, packed>(image + pixel * pixel_step, channel_step, channels - channel, values);
#pragma unroll
        for (int c = 0; c < width; ++c) {
          const bool taken = values[c] > best[c] || values[c] != values[c];
          best[c] = taken ? values[c] : best[c];
          place[c] = taken ? pixel : place[c];
        }
      }
    }
    const int64_t bin_step = output.channel_step(channels),
                  bin = static_cast<int64_t>(at.row) * output.width + at.column;
    const int64_t to = k * channels * output.pixels() + channel * bin_step + bin * output.pixel_step(channels);
    store_channels<width, packed>(output.data + to, bin_step, channels - channel, best);
    store_channels<width, packed>(argmax.data + to, bin_step, channels - channel, place);
  }
}

// ---- backward: a block takes a tile of cells and loops over the boxes that touch it ----

// Packed: a lane takes `width` of 32 * width channels and the 8 cells of its warp's row. Else it takes one of 32 cells
// of that row, in `width` channels.
template <typename scalar_t, int width, bool packed>
__global__ void __launch_bounds__(tile_threads, 2)  // without the 2, ptxas spills to stay below 80 registers
    roi_pool_backward_kernel(MapView<const scalar_t> grad_output, MapView<const int32_t> argmax,
                             const float* __restrict__ boxes, Pyramid<scalar_t> grad_input, int64_t box_count,
                             int64_t tiles) {
  constexpr int tile_columns = packed ? 8 : 32, cells = packed ? tile_columns : 1;
  FASTSEG_SHARED(int, list, [tile_threads]);
  FASTSEG_SHARED(int, counts, [tile_threads / 32]);
  const Tiling<scalar_t> tiling{tile_rows, tile_columns, packed ? 32 * width : width};
  const MapView<scalar_t>& map = grad_input.maps[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = grad_input.channels;
  const int bin_rows = grad_output.height, bin_columns = grad_output.width;
  const int64_t bin_channel_step = grad_output.channel_step(channels), bin_step = grad_output.pixel_step(channels);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tiling.at(grad_input, index);
    const int channel = tile.first_channel + (packed ? lane * width : 0), count = channels - channel;
    const int y = tile.top + warp, left = tile.left + (packed ? 0 : lane);
    const bool writes = y < map.height && count > 0 && left < map.width;
    float sums[cells][width] = {};
    for (int64_t first = 0; first < box_count; first += tile_threads) {
      const int64_t own = first + threadIdx.x;
      bool touches = false;
      if (own < box_count) {
        const BoxBins box = box_bins(boxes + 5 * own, grad_input, bin_rows, bin_columns);
        touches =
            box.image == tile.image &&
            may_touch(box.rows.start, box.rows.start + box.rows.bin * bin_rows, tile.top, tile_rows) &&
            may_touch(box.columns.start, box.columns.start + box.columns.bin * bin_columns, tile.left, tile_columns);
      }
      const int listed = list_in_order<tile_threads>(touches, threadIdx.x, list, counts);
      for (int entry = 0; writes && entry < listed; ++entry) {
        const int64_t k = first + list[entry];
        const BoxBins box = box_bins(boxes + 5 * k, grad_input, bin_rows, bin_columns);
        const auto down = box.rows.near(y, bin_rows);
        const int right_first = box.columns.near(left, bin_columns).first;
        const int right_end = box.columns.near(left + cells - 1, bin_columns).end;
        const int64_t from = k * channels * grad_output.pixels() + channel * bin_channel_step;
        for (int p = down.first; p < down.end; ++p) {
          for (int q = right_first; q < right_end; ++q) {
            const int64_t bin = from + (static_cast<int64_t>(p) * bin_columns + q) * bin_step;
            int places[width];
            float values[width];
            load_channels<width, packed>(argmax.data + bin, bin_channel_step, count, places);
            load_channels<width, packed>(grad_output.data + bin, bin_channel_step, count, values);
#pragma unroll
            for (int x = 0; x < cells; ++x) {
#pragma unroll
              for (int c = 0; c < width; ++c) {
                if (places[c] == y * map.width + left + x) sums[x][c] += values[c];
              }
            }
          }
        }
      }
    }
    if (!writes) continue;
    const int64_t channel_step = map.channel_step(channels), pixel_step = map.pixel_step(channels);
    scalar_t* to = map.data + tile.image * channels * map.pixels() + channel * channel_step;
#pragma unroll
    for (int x = 0; x < cells; ++x) {
      if (left + x >= map.width) continue;
      const int64_t pixel = static_cast<int64_t>(y) * map.width + left + x;
      store_channels<width, packed>(to + pixel * pixel_step, channel_step, count, sums[x]);
    }
  }
}

// ---- launches ----

template <int width, bool packed, typename scalar_t>
cudaError_t launch_forward(const Pyramid<const scalar_t>& input, const float* boxes, const MapView<scalar_t>& output,
                           const MapView<int32_t>& argmax, int64_t count, cudaStream_t stream) {
  const int blocks = (input.channels + width - 1) / width;
  const Cells cells = packed ? Cells{count, output.height, output.width, blocks}
                             : Cells{count * blocks, output.height, output.width, 1};
  return launch_over_cells(cells, stream, roi_pool_forward_kernel<scalar_t, width, packed>, input, boxes, output,
                           argmax, blocks);
}

template <int width, bool packed, typename scalar_t>
cudaError_t launch_backward(const MapView<const scalar_t>& grad_output, const MapView<const int32_t>& argmax,
                            const float* boxes, const Pyramid<scalar_t>& grad_input, int64_t count,
                            cudaStream_t stream) {
  constexpr int64_t most = 1 << 30;
  const Tiling<scalar_t> tiling{tile_rows, packed ? 8 : 32, packed ? 32 * width : width};
  const int64_t tiles = tiling.count(grad_input);
  if (tiles == 0) return cudaSuccess;
  FASTSEG_LAUNCH((roi_pool_backward_kernel<scalar_t, width, packed>),
                 dim3(static_cast<unsigned>(tiles < most ? tiles : most)), dim3(tile_threads), 0, stream, grad_output,
                 argmax, boxes, grad_input, count, tiles);
  return cudaGetLastError();
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_roi_pool_forward(const Pyramid<const scalar_t>& input, const float* boxes,
                                    const MapView<scalar_t>& output, const MapView<int32_t>& argmax, int64_t count,
                                    cudaStream_t stream) {
  return holds_channel_packs<4>(input, output) && holds_channel_packs<4>(input, argmax)
             ? launch_forward<4, true>(input, boxes, output, argmax, count, stream)
             : launch_forward<4, false>(input, boxes, output, argmax, count, stream);
}

template <typename scalar_t>
cudaError_t launch_roi_pool_backward(const MapView<const scalar_t>& grad_output, const MapView<const int32_t>& argmax,
                                     const float* boxes, const Pyramid<scalar_t>& grad_input, int64_t count,
                                     cudaStream_t stream) {
  return holds_channel_packs<4>(grad_input, grad_output) && holds_channel_packs<4>(grad_input, argmax)
             ? launch_backward<4, true>(grad_output, argmax, boxes, grad_input, count, stream)
             : launch_backward<8, false>(grad_output, argmax, boxes, grad_input, count, stream);
}

#define INSTANTIATE(scalar_t)                                                                                          \
  template cudaError_t launch_roi_pool_forward(const Pyramid<const scalar_t>&, const float*, const MapView<scalar_t>&, \
                                               const MapView<int32_t>&, int64_t, cudaStream_t);                        \
  template cudaError_t launch_roi_pool_backward(const MapView<const scalar_t>&, const MapView<const int32_t>&,         \
                                                const float*, const Pyramid<scalar_t>&, int64_t, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(c10::Half)
INSTANTIATE(c10::BFloat16)

}  // namespace fastseg::cuda
