// Packed masks as arguments of launchers and kernels. words [N, height, pitch] as in csrc/fastseg/packed_masks.h.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

constexpr int mask_word = 32;      // pixels in a word
constexpr int mask_threads = 256;  // of a block

// A row of the tensor of boxes: x2 and y2 lie one past the last pixel, an empty mask has zeros.
struct Box {
  int x1, y1, x2, y2;
};

// Packed masks with their areas and boxes.
struct KnownMasks {
  const unsigned* words;           // [count, height, pitch]
  const long long* areas;          // [count]
  const Box* boxes;                // [count]
  long long count, height, pitch;  // less than 2^32 pixels a mask

  __device__ const unsigned* mask(long long n) const { return words + n * height * pitch; }
};

// Words of a row of `width` pixels.
inline long long words_in_row(long long width) { return (width + mask_word - 1) / mask_word; }

// Blocks for `items` items, one each, at most 2^20: kernels loop over the rest.
inline unsigned blocks_for(long long items) { return static_cast<unsigned>(items < (1 << 20) ? items : 1 << 20); }

// Blocks for `warps` warps of work.
inline unsigned blocks_for_warps(long long warps) {
  constexpr int warps_of_block = mask_threads / 32;
  return blocks_for((warps + warps_of_block - 1) / warps_of_block);
}

}  // namespace fastseg::cuda
