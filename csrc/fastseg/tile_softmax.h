// Softmax of a tile of pixel_tile.h: the loops over all classes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"

namespace fastseg {

#if defined(__AVX512F__)
constexpr int kGroup = 8;  // vectors of 16 pixels whose running maximum and sum stay in registers
#else
constexpr int kGroup = 4;
#endif

// 16 pixels of one row in the loops over all classes. One register under AVX-512. Below it an array with
// plain loops, which GCC vectorises at the machine's own width, where its 64-byte vectors would go through
// memory (2.4x slower as measured).
template <typename accumulate_t>
struct TileLanes {
  using vector_t = simd::vec<accumulate_t>;
#if defined(__AVX512F__)
  vector_t values;
  template <typename tile_t>
  FASTSEG_INLINE void read(const tile_t& tile, int64_t c, int i) {
    values = tile.load(c, i);
  }
  FASTSEG_INLINE void read(const accumulate_t* from) { values = simd::load(from); }
  FASTSEG_INLINE void write(accumulate_t* to) const { simd::store(to, values); }
  FASTSEG_INLINE vector_t vector() const { return values; }
  FASTSEG_INLINE void set(vector_t vector) { values = vector; }
  FASTSEG_INLINE void clear() { values = vector_t{}; }
  FASTSEG_INLINE void raise_to(const TileLanes& candidate) {
    values = simd::maximum(values, candidate.values);
  }
  FASTSEG_INLINE void subtract(const TileLanes& other) { values -= other.values; }
  FASTSEG_INLINE void multiply(const TileLanes& other) { values *= other.values; }
  FASTSEG_INLINE void add(const TileLanes& other) { values += other.values; }
  FASTSEG_INLINE void exp_of(const TileLanes& x) { values = simd::exp_nonpositive(x.values); }
#else
  accumulate_t values[kLanes];
  template <typename Function>
  FASTSEG_INLINE void each(const Function& fn) {
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = fn(lane);
  }
  template <typename tile_t>
  FASTSEG_INLINE void read(const tile_t& tile, int64_t c, int i) {
    each([&](int lane) { return tile.at(c, i + lane); });
  }
  FASTSEG_INLINE void read(const accumulate_t* from) {
    each([&](int lane) { return from[lane]; });
  }
  FASTSEG_INLINE void write(accumulate_t* to) const {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = values[lane];
  }
  FASTSEG_INLINE vector_t vector() const { return simd::load(values); }
  FASTSEG_INLINE void set(vector_t vector) { simd::store(values, vector); }
  FASTSEG_INLINE void clear() {
    each([&](int) { return accumulate_t(0); });
  }
  FASTSEG_INLINE void raise_to(const TileLanes& candidate) {
    each([&](int lane) {
      return candidate.values[lane] > values[lane] ? candidate.values[lane] : values[lane];
    });
  }
  FASTSEG_INLINE void subtract(const TileLanes& other) {
    each([&](int lane) { return values[lane] - other.values[lane]; });
  }
  FASTSEG_INLINE void multiply(const TileLanes& other) {
    each([&](int lane) { return values[lane] * other.values[lane]; });
  }
  FASTSEG_INLINE void add(const TileLanes& other) {
    each([&](int lane) { return values[lane] + other.values[lane]; });
  }
  FASTSEG_INLINE void exp_of(const TileLanes& x) {
    each([&](int lane) { return simd::exp_nonpositive(x.values[lane]); });
  }
#endif
};

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
  using lanes_t = TileLanes<typename tile_t::accumulate_t>;
  for_each_group(pixels, [&](int first, auto vectors) {
    lanes_t best[vectors];
    for (int v = 0; v < vectors; ++v) best[v].read(tile, 0, first + v * kLanes);
    for (int64_t c = 0; c < classes; ++c) {
      for (int v = 0; v < vectors; ++v) {
        tile.prefetch(c, first + v * kLanes, pixels);
        lanes_t candidate;
        candidate.read(tile, c, first + v * kLanes);
        best[v].raise_to(candidate);
      }
    }
    for (int v = 0; v < vectors; ++v) best[v].write(maximum + first + v * kLanes);
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
  using lanes_t = TileLanes<typename tile_t::accumulate_t>;
  for_each_group(pixels, [&](int first, auto vectors) {
    lanes_t largest[vectors], total[vectors];
    for (int v = 0; v < vectors; ++v) {
      largest[v].read(maximum + first + v * kLanes);
      total[v].clear();
    }
    for (int64_t begin = 0; begin < classes; begin += kSumBlock) {
      const int64_t end = std::min(begin + kSumBlock, classes);
      lanes_t block[vectors];
      for (int v = 0; v < vectors; ++v) block[v].clear();
      for (int64_t c = begin; c < end; ++c) {
        for (int v = 0; v < vectors; ++v) {
          const int i = first + v * kLanes;
          lanes_t shifted, exponential;
          shifted.read(tile, c, i);
          shifted.subtract(largest[v]);
          exponential.exp_of(shifted);
          block[v].add(exponential);
          exponential.write(rows + c * row_stride + i);
          each(c, i, shifted.vector(), exponential.vector());
        }
      }
      for (int v = 0; v < vectors; ++v) total[v].add(block[v]);
    }
    for (int v = 0; v < vectors; ++v) total[v].write(sum + first + v * kLanes);
  });
}

}  // namespace fastseg
