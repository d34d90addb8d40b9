// Loads and stores of the channels that a thread of the RoI kernels handles at once.
#pragma once

#include "cuda/pack.h"
#include "roi_align/cuda.h"

namespace fastseg::cuda {

// `width` channels of a pixel: one pack if `packed`, else the first `count` of them, `step` apart.
template <int width, bool packed, typename scalar_t, typename value_t>
__device__ void load_channels(const scalar_t* from, int64_t step, int count, value_t (&values)[width]) {
  if constexpr (packed) {
    const auto pack = load_pack<width>(from);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = static_cast<value_t>(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = i < count ? static_cast<value_t>(from[i * step]) : value_t(0);
  }
}
template <int width, bool packed, typename scalar_t, typename value_t>
__device__ void store_channels(scalar_t* to, int64_t step, int count, const value_t (&values)[width]) {
  if constexpr (packed) {
    Pack<scalar_t, width> pack;
#pragma unroll
    for (int i = 0; i < width; ++i) pack.values[i] = static_cast<scalar_t>(values[i]);
    store_pack<width>(to, pack);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (i < count) to[i * step] = static_cast<scalar_t>(values[i]);
    }
  }
}

// Whether all maps and the pooled tensor hold packs of `width` channels at every pixel.
template <int width, typename element_t, typename pooled_t>
bool holds_channel_packs(const Pyramid<element_t>& pyramid, const MapView<pooled_t>& pooled) {
  const auto is_interleaved = [](const auto& map) { return map.interleaved || map.pixels() == 1; };
  bool holds = pyramid.channels % width == 0 && is_interleaved(pooled) && holds_packs<width>(pooled.data);
  for (int level = 0; level < pyramid.levels; ++level) {
    const MapView<element_t>& map = pyramid.maps[level];
    holds = holds && is_interleaved(map) && holds_packs<width>(map.data);
  }
  return holds;
}

}  // namespace fastseg::cuda
