// The largest logits of a tile (pixel_tile.h).
#pragma once

#include <cstdint>

#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"

namespace fastseg {

struct Unchanged {
  template <typename vector_t>
  FASTSEG_INLINE vector_t operator()(vector_t logits) const {
    return logits;
  }
};

// labels[i] = the first class of pixel i whose score(logit) is the maximum; NaN is above every number.
template <typename scalar_t, typename Score = Unchanged>
FASTSEG_INLINE void tile_argmax(const Tile<scalar_t>& tile, int classes, int pixels, int32_t* labels,
                                const Score& score = {}) {
  using simd::i32x16;
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  for_each_group(pixels, [&](int first, auto vectors) {
    vector_t best[vectors];
    i32x16 label[vectors]{};
    for (int v = 0; v < vectors; ++v) best[v] = score(tile.load(0, first + v * kLanes));
    for (int c = 0; c < classes; ++c) {
      for (int v = 0; v < vectors; ++v) {
        const int i = first + v * kLanes;
        tile.prefetch(c, i);
        const vector_t candidate = score(tile.load(c, i));
        const auto better = ~(candidate <= best[v]) & (best[v] == best[v]);
        best[v] = simd::select(better, candidate, best[v]);
        label[v] = simd::select(simd::convert<i32x16>(better), simd::splat(c), label[v]);
      }
    }
    for (int v = 0; v < vectors; ++v) simd::store(labels + first + v * kLanes, label[v]);
  });
}

}  // namespace fastseg
