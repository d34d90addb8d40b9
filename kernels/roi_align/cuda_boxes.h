// Boxes in the CUDA kernels: the samples of a box, and the boxes that touch a tile of a map.
#pragma once

#include "roi_align/cuda.h"
#include "roi_align/grid.h"

namespace fastseg::cuda {

struct BoxGrid {
  int level;
  int64_t image;  // -1 if there is no such image
  roi::Grid<float> rows, columns;

  __device__ bool is_empty() const { return image < 0 || rows.samples == 0 || columns.samples == 0; }
};

template <typename element_t>
__device__ BoxGrid box_grid(const float* box, const Pyramid<element_t>& pyramid, const BoxSampling& sampling,
                            int bin_rows, int bin_columns) {
  const int level = roi::level_of(box[1], box[2], box[3], box[4], pyramid.areas, pyramid.levels);
  const MapView<element_t>& map = pyramid.maps[level];
  const float scale = pyramid.scales[level];
  return {level, roi::image_of(box[0], pyramid.images),
          roi::make_grid(box[2], box[4], scale, sampling.aligned, bin_rows, sampling.sampling_ratio, map.height),
          roi::make_grid(box[1], box[3], scale, sampling.aligned, bin_columns, sampling.sampling_ratio, map.width)};
}

constexpr int tile_threads = 256, tile_rows = tile_threads / 32;  // a warp takes a row of a tile

// A rectangle of cells of an image of a level, and a block of channels: one block of threads writes it.
struct Tile {
  int level, top, left;
  int64_t image;
  int first_channel;
};

// All tiles of a pyramid: `rows` x `columns` cells and `channels_each` channels each.
template <typename element_t>
struct Tiling {
  int rows, columns, channels_each;

  __host__ __device__ static int64_t count_of(int size, int each) { return (size + each - 1) / each; }
  __host__ __device__ int64_t of_level(const Pyramid<element_t>& pyramid, int level) const {
    const MapView<element_t>& map = pyramid.maps[level];
    return count_of(map.height, rows) * count_of(map.width, columns) * pyramid.images *
           count_of(pyramid.channels, channels_each);
  }
  int64_t count(const Pyramid<element_t>& pyramid) const {
    int64_t all = 0;
    for (int level = 0; level < pyramid.levels; ++level) all += of_level(pyramid, level);
    return all;
  }
  __device__ Tile at(const Pyramid<element_t>& pyramid, int64_t index) const {
    int level = 0;
    for (; index >= of_level(pyramid, level); ++level) index -= of_level(pyramid, level);
    const MapView<element_t>& map = pyramid.maps[level];
    const int64_t across = count_of(map.width, columns), down = count_of(map.height, rows);
    const int64_t blocks = count_of(pyramid.channels, channels_each);
    const int left = static_cast<int>(index % across) * columns;
    index /= across;
    const int top = static_cast<int>(index % down) * rows;
    index /= down;
    return {level, top, left, index / blocks, static_cast<int>(index % blocks) * channels_each};
  }
};

// Whether samples between `start` and `end` may touch cells [first, first + count).
__device__ inline bool may_touch(float start, float end, int first, int count) {
  const float low = start < end ? start : end, high = start < end ? end : start;
  return high >= first - 2 && low <= first + count + 1;
}
__device__ inline bool may_touch(const roi::Grid<float>& grid, int bins, int first, int count) {
  return may_touch(grid.start, grid.start + grid.bin * bins, first, count);
}

// Each thread of a block passes a box; lists those that are `wanted`, in order, and returns how many there are.
template <int threads>
__device__ int list_in_order(bool wanted, int box, int (&list)[threads], int (&counts)[threads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(~0u, wanted);
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();  // also: the previous list has been read
  int before = 0, all = 0;
  for (int i = 0; i < threads / 32; ++i) {
    before += i < warp ? counts[i] : 0;
    all += counts[i];
  }
  if (wanted) list[before + __popc(votes & ((1u << lane) - 1))] = box;
  __syncthreads();  // also: the counts have been read
  return all;
}

}  // namespace fastseg::cuda
