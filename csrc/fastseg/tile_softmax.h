// Softmax of a tile of pixel_tile.h: the loops over all classes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"

namespace fastseg {

// maximum[i] = largest logit of pixel i; NaN logits are skipped (their exponentials are NaN later). Reads the logits
// once and stores them, widened, to `rows`. Goes from the last class to the first: rows a power of two apart share a
// cache set, which still holds those that tile_softmax() prefetched last.
template <typename scalar_t>
FASTSEG_INLINE void tile_maximum(Tile<scalar_t> tile, int64_t classes, int pixels,
                                 simd::accumulate<scalar_t>* maximum) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  for_each_group(pixels, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
    vector_t best[vectors];
    for (int v = 0; v < vectors; ++v) best[v] = tile.fetch(classes - 1, first + v * kLanes);
    for (int64_t c = classes - 2; c >= 0; --c) {
      for (int v = 0; v < vectors; ++v) best[v] = simd::maximum(best[v], tile.fetch(c, first + v * kLanes));
    }
    for (int v = 0; v < vectors; ++v) simd::store(maximum + first + v * kLanes, best[v]);
  });
}

// Classes in a block: sums are taken in blocks, then over the blocks, so that their error does not grow with C.
constexpr int64_t kSumBlock = 32;

// rows[c][i], the logits that tile_maximum() stored, become e^(logit - maximum[i]); sum[i] = their sum over c.
// Calls each(c, i, shifted logits, exponentials) for every vector of 16 pixels from i on. The next tile is prefetched
// here, not in tile_maximum(), which already waits for memory: its lines arrive during the exponentials.
template <typename scalar_t, typename Each>
FASTSEG_INLINE void tile_softmax(Tile<scalar_t> tile, int64_t classes, int pixels,
                                 const simd::accumulate<scalar_t>* maximum, simd::accumulate<scalar_t>* sum,
                                 const Each& each) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  for_each_group(pixels, [&](int first, auto vectors) FASTSEG_ALWAYS_INLINE {
    vector_t largest[vectors], total[vectors];
    for (int v = 0; v < vectors; ++v) {
      largest[v] = simd::load(maximum + first + v * kLanes);
      total[v] = vector_t{};
    }
    for (int64_t begin = 0; begin < classes; begin += kSumBlock) {
      const int64_t end = std::min(begin + kSumBlock, classes);
      vector_t block[vectors];
      for (int v = 0; v < vectors; ++v) block[v] = vector_t{};
      for (int64_t c = begin; c < end; ++c) {
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          tile.prefetch(c, i);
          accumulate_t* at = tile.rows + c * tile.row_stride + i;
          const vector_t shifted = simd::load(at) - largest[v];
          const vector_t exponential = simd::exp_of_logits<scalar_t>(shifted);
          block[v] += exponential;
          simd::store(at, exponential);
          each(c, i, shifted, exponential);
        }
      }
      for (int v = 0; v < vectors; ++v) total[v] += block[v];
    }
    for (int v = 0; v < vectors; ++v) simd::store(sum + first + v * kLanes, total[v]);
  });
}

}  // namespace fastseg
