// Bands of rows in which gradients of maps are summed: a band stays in the cache and is rounded once.
#pragma once

#include <vector>

#include "roi_align/boxes.h"
#include "roi_align/lanes.h"

namespace fastseg::roi {

// Rounds the sums [rows * width][channels] to the window of a map.
template <typename Lanes, typename scalar_t, typename value_t>
void round_cells(const Lanes& lanes, const std::vector<value_t>& cells, const Map<scalar_t>& map, int64_t image,
                 int64_t channel, const Window& window, std::vector<scalar_t>& buffer) {
  using Full = std::conditional_t<Lanes::kChannels == 1, Lanes, Wide<value_t, Lanes::kWidth>>;
  const auto to = block_to_write(map, lanes, image, channel, window, buffer);
  const value_t* from = cells.data();
  for (int64_t y = 0; y < window.bottom - window.top; ++y) {
    for (int64_t x = 0; x < window.width(); ++x, from += Lanes::kChannels) {
      FASTSEG_UNROLL
      for (int i = 0; i < Lanes::kWidth; ++i) {
        lanes.store(to.at(y, x) + i * Lanes::kStep, Full::load(from + i * Lanes::kStep));
      }
    }
  }
  write_block(map, lanes, image, channel, window, buffer, to);
}

// Rows [top, bottom) of an image of a level.
struct Band {
  const Group* group;
  int64_t top, bottom;
};

// Bands whose sums for one block of channels stay in the second-level cache.
template <typename scalar_t>
std::vector<Band> bands_of(const std::vector<Group>& groups, const std::vector<Map<scalar_t>>& maps, int64_t block) {
  constexpr int64_t kValues = 192 * 1024;
  std::vector<Band> bands;
  for (const Group& group : groups) {
    const Map<scalar_t>& map = maps[group.level];
    const int64_t rows = std::clamp<int64_t>(kValues / (map.width * block), 1, map.height);
    for (int64_t top = 0; top < map.height; top += rows) {
      bands.push_back({&group, top, std::min(top + rows, map.height)});
    }
  }
  return bands;
}

}  // namespace fastseg::roi
