// Softmax of a tile of pixel_tile.h: the loops over all classes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"

namespace fastseg {

// Vectors of 16 pixels whose running maximum and sum stay in registers. (Eight are no faster under
// AVX-512, and leave the tiles of many classes, which are smaller, to single vectors.)
constexpr int kGroup = simd::kRegisterBytes > 16 ? 4 : 2;

// Calls body(first_pixel, constant<vectors>) over the tile's pixels, in groups that fit the registers.
template <int vectors>
using constant = std::integral_constant<int, vectors>;

template <typename Body>
FASTSEG_INLINE void for_each_group(int tile, const Body& body) {
  int i = 0;
  for (; i + kGroup * kLanes <= tile; i += kGroup * kLanes) body(i, constant<kGroup>());
  for (; i < tile; i += kLanes) body(i, constant<1>());
}

// maximum[i] = largest logit of pixel i; NaN logits are passed over (they come back as NaN exponentials).
template <typename tile_t>
FASTSEG_INLINE void tile_maximum(const tile_t& tile, int64_t classes, int pixels,
                                 typename tile_t::accumulate_t* maximum) {
  using vector_t = simd::vec<typename tile_t::accumulate_t>;
  for_each_group(pixels, [&](int first, auto vectors) {
    vector_t best[vectors];
    for (int v = 0; v < vectors; ++v) best[v] = tile.load(0, first + v * kLanes);
    for (int64_t c = 0; c < classes; ++c) {
      for (int v = 0; v < vectors; ++v) {
        tile.prefetch(c, first + v * kLanes, pixels);
        best[v] = simd::maximum(best[v], tile.load(c, first + v * kLanes));
      }
    }
    for (int v = 0; v < vectors; ++v) simd::store(maximum + first + v * kLanes, best[v]);
  });
}

constexpr int64_t kSumBlock =
    32;  // sums over many classes go in two levels, so that their error does not grow with C

// rows[c][i] = e^(logit - maximum[i]); sum[i] = their sum over c. each(c, i, shifted logits, exponentials)
// sees every vector of 16 pixels from i on as it passes.
template <typename tile_t, typename Each>
FASTSEG_INLINE void tile_softmax(const tile_t& tile, int64_t classes, int pixels,
                                 typename tile_t::accumulate_t* rows, int64_t row_stride,
                                 const typename tile_t::accumulate_t* maximum,
                                 typename tile_t::accumulate_t* sum, const Each& each) {
  using vector_t = simd::vec<typename tile_t::accumulate_t>;
  for_each_group(pixels, [&](int first, auto vectors) {
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
          const vector_t shifted = tile.load(c, i) - largest[v];
          const vector_t exponential = simd::exp_nonpositive(shifted);
          block[v] += exponential;
          simd::store(rows + c * row_stride + i, exponential);
          each(c, i, shifted, exponential);
        }
      }
      for (int v = 0; v < vectors; ++v) total[v] += block[v];
    }
    for (int v = 0; v < vectors; ++v) simd::store(sum + first + v * kLanes, total[v]);
  });
}

}  // namespace fastseg
