// Packed masks in kernels: overlaps of boxes, and intersections counted by a warp.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

constexpr unsigned all_lanes = ~0u;

// The rows and words that two boxes have in common, cut to the masks, and the most pixels that this can be.
struct Overlap {
  int first_row, rows, first_word, words;
  long long pixels;

  __device__ Overlap(const Box& a, const Box& b, const KnownMasks& masks) {
    const int x1 = max(max(a.x1, b.x1), 0), y1 = max(max(a.y1, b.y1), 0);
    const int x2 = min(min(a.x2, b.x2), static_cast<int>(masks.pitch * mask_word));
    const int y2 = min(min(a.y2, b.y2), static_cast<int>(masks.height));
    const bool disjoint = x1 >= x2 || y1 >= y2;
    pixels = disjoint ? 0 : static_cast<long long>(x2 - x1) * (y2 - y1);
    first_row = y1;
    rows = disjoint ? 0 : y2 - y1;
    first_word = x1 / mask_word;
    words = disjoint ? 0 : (x2 - 1) / mask_word + 1 - first_word;
  }
};

// The number of pixels that two masks share. All lanes of a warp call it together and get the result. Groups of lanes,
// as wide as a row of the overlap has words (rounded up to a power of two), take one row each.
__device__ inline unsigned intersection(const unsigned* __restrict__ a, const unsigned* __restrict__ b,
                                        const Overlap& at, long long pitch) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  int width_log2 = 0;
  while (width_log2 < 5 && 1 << width_log2 < at.words) ++width_log2;
  const int column = lane & ((1 << width_log2) - 1);
  unsigned count = 0;
  for (int row = lane >> width_log2; row < at.rows; row += warpSize >> width_log2) {
    const long long first = (at.first_row + row) * pitch + at.first_word;
    for (int w = column; w < at.words; w += warpSize) count += __popc(a[first + w] & b[first + w]);
  }
  return __reduce_add_sync(all_lanes, count);
}

// 0 / 0 is 0. The same number as on the CPU.
__device__ inline double ratio(long long part, long long whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
}

// The mask at a place of a ranking; 0 for a number that is no index of a mask.
__device__ inline long long ranked(const long long* order, long long place, long long masks) {
  const long long index = order[place];
  return index >= 0 && index < masks ? index : 0;
}

// This warp's number in the grid, and how many there are.
__device__ inline long long warp_of_grid() {
  return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / warpSize;
}
__device__ inline long long warps_of_grid() { return static_cast<long long>(gridDim.x) * (blockDim.x / warpSize); }

}  // namespace fastseg::cuda
