// Lanes: the channels that the loops of the CPU kernels handle at once.
#pragma once

#include <vector>

#include "roi_align/maps.h"

namespace fastseg::roi {

// Several registers of 16 channels.
template <typename accumulate_t, int registers>
struct Wide {
  using value_t = accumulate_t;
  using vector_t = simd::vec<value_t>;
  static constexpr int kWidth = registers, kStep = kLanes, kChannels = kLanes * registers;

  static int count() { return kChannels; }
  static FASTSEG_INLINE vector_t splat(value_t value) { return simd::splat(value); }
  template <typename scalar_t>
  static FASTSEG_INLINE vector_t load(const scalar_t* from) {
    return simd::load(from);
  }
  template <typename scalar_t, typename lanes_t>
  static FASTSEG_INLINE void store(scalar_t* to, lanes_t lanes) {
    simd::store(to, lanes);
  }
};

// Fewer than 16 channels, the last ones of a map, in one register. The other lanes are ignored.
template <typename accumulate_t>
struct Partial : Wide<accumulate_t, 1> {
  using typename Wide<accumulate_t, 1>::vector_t;
  int channels;

  int count() const { return channels; }
  template <typename scalar_t>
  FASTSEG_INLINE vector_t load(const scalar_t* from) const {
    return simd::load_partial(from, channels, scalar_t(0));
  }
  template <typename scalar_t, typename lanes_t>
  FASTSEG_INLINE void store(scalar_t* to, lanes_t lanes) const {
    simd::store_partial(to, lanes, channels);
  }
};

// A single channel, for maps with few channels.
template <typename accumulate_t>
struct Single {
  using value_t = accumulate_t;
  using vector_t = value_t;
  static constexpr int kWidth = 1, kStep = 1, kChannels = 1;

  static int count() { return 1; }
  static FASTSEG_INLINE vector_t splat(value_t value) { return value; }
  template <typename scalar_t>
  static FASTSEG_INLINE vector_t load(const scalar_t* from) {
    return static_cast<value_t>(*from);
  }
  template <typename scalar_t, typename lane_t>
  static FASTSEG_INLINE void store(scalar_t* to, lane_t value) {
    *to = static_cast<scalar_t>(value);
  }
};

// Maps of fewer channels are walked one channel at a time.
constexpr int64_t kFewChannels = 8;
// Channels that one thread takes at a time, if interleaved and if planes.
constexpr int64_t kInterleavedBlock = 64, kPlanarBlock = kLanes;

inline int64_t channel_block(int64_t channels, bool interleaved) {
  return interleaved || channels < kFewChannels ? kInterleavedBlock : kPlanarBlock;
}

// Calls body(lanes, first channel) for the channels [begin, end) of a map with `channels`.
template <typename value_t, typename Body>
void for_channels(int64_t begin, int64_t end, int64_t channels, const Body& body) {
  if (channels < kFewChannels) {
    for (int64_t c = begin; c < end; ++c) body(Single<value_t>{}, c);
    return;
  }
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) body(Wide<value_t, 4>{}, c);
  for (; c + kLanes <= end; c += kLanes) body(Wide<value_t, 1>{}, c);
  if (c < end) body(Partial<value_t>{{}, static_cast<int>(end - c)}, c);
}

// The pixels of a window: in the map itself or, for several planes, in `buffer`.
template <typename Lanes, typename scalar_t, typename value_t>
Block<scalar_t> in_place(const Map<scalar_t>& map, int64_t image, int64_t channel, const Window& window,
                         std::vector<value_t>& buffer) {
  scalar_t* corner = map.at(image, channel, window.top * map.width + window.left);
  if (map.interleaved) return {corner, map.channels, map.width * map.channels};
  if (Lanes::kChannels == 1) return {corner, 1, map.width};
  const size_t values = window.area() * Lanes::kChannels;
  if (buffer.size() < values) buffer.resize(values);
  return {buffer.data(), Lanes::kChannels, window.width() * Lanes::kChannels};
}

// Calls body(place in the window, place in the plane, length) for runs of pixels that are contiguous in both.
template <typename scalar_t, typename Body>
void for_runs(const Map<scalar_t>& map, const Window& window, const Body& body) {
  if (window.width() == map.width) return body(0, window.top * map.width, window.area());
  for (int64_t y = window.top; y < window.bottom; ++y) {
    body((y - window.top) * window.width(), y * map.width + window.left, window.width());
  }
}

// The pixels of a window for reading. Interleaved channels and single channels are read in place; planes are copied to
// `buffer`, channels innermost.
template <typename Lanes, typename scalar_t>
Block<const scalar_t> read_block(const Map<const scalar_t>& map, const Lanes& lanes, int64_t image, int64_t channel,
                                 const Window& window, std::vector<scalar_t>& buffer) {
  const Block<const scalar_t> block = in_place<Lanes>(map, image, channel, window, buffer);
  if (block.data == buffer.data()) {
    for_runs(map, window, [&](int64_t first, int64_t plane_first, int64_t length) {
      detail::transpose(map.at(image, channel, plane_first), map.pixels(), buffer.data() + first * Lanes::kChannels,
                        Lanes::kChannels, lanes.count(), length);
    });
  }
  return block;
}

// Where to write the pixels of a window: the map itself, or `buffer`, which write_block() moves to the map.
template <typename Lanes, typename scalar_t>
Block<scalar_t> block_to_write(const Map<scalar_t>& map, const Lanes&, int64_t image, int64_t channel,
                               const Window& window, std::vector<scalar_t>& buffer) {
  return in_place<Lanes>(map, image, channel, window, buffer);
}
template <typename Lanes, typename scalar_t>
void write_block(const Map<scalar_t>& map, const Lanes& lanes, int64_t image, int64_t channel, const Window& window,
                 const std::vector<scalar_t>& buffer, const Block<scalar_t>& written) {
  if (written.data != buffer.data()) return;
  for_runs(map, window, [&](int64_t first, int64_t plane_first, int64_t length) {
    detail::transpose(buffer.data() + first * Lanes::kChannels, Lanes::kChannels, map.at(image, channel, plane_first),
                      map.pixels(), length, lanes.count());
  });
}

}  // namespace fastseg::roi
