// The boxes of a call with their factors, and the groups in which they are computed.
#pragma once

#include <vector>

#include "roi_align/maps.h"
#include "roi_align/taps.h"

namespace fastseg::roi {

// Parameters of all boxes of a call.
struct Sampling {
  std::vector<double> scales, areas;  // of each level: its scale, and the least area of the next one
  int64_t ratio;
  bool aligned;
  int64_t bin_rows, bin_columns;

  int levels() const { return static_cast<int>(scales.size()); }
  int64_t bins() const { return bin_rows * bin_columns; }
};

struct Size {
  int64_t height, width;
};

template <typename value_t>
struct Box {
  int level;
  int64_t image;
  Taps<value_t> rows, columns;  // [bins, cells], or transposed [cells, bins]
  Window window;                // that contains all cells with a tap
};

// Range of the places of all taps.
template <typename value_t>
std::pair<int64_t, int64_t> places_of(const Taps<value_t>& taps) {
  int64_t low = INT32_MAX, high = -1;
  for (const Tap<value_t>& tap : taps.all()) {
    low = std::min<int64_t>(low, tap.place);
    high = std::max<int64_t>(high, tap.place);
  }
  return {low, high + 1};
}

// values: [K, 5], with valid batch indices. by_cell: transposes the factors.
template <typename value_t>
std::vector<Box<value_t>> make_boxes(const value_t* values, int64_t count, const std::vector<Size>& sizes,
                                     const Sampling& sampling, bool by_cell) {
  std::vector<Box<value_t>> boxes(count);
  parallel_slices(count, slice_count(count, 16), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const value_t* box = values + 5 * k;
      const int level = level_of(box[1], box[2], box[3], box[4], sampling.areas, sampling.levels());
      const value_t scale = static_cast<value_t>(sampling.scales[level]);
      const auto factor = [&](value_t low, value_t high, int64_t bins, int64_t size) {
        const int count = static_cast<int>(bins);
        return make_grid(low, high, scale, sampling.aligned, count, sampling.ratio, static_cast<int>(size));
      };
      const Grid<value_t> down = factor(box[2], box[4], sampling.bin_rows, sizes[level].height);
      const Grid<value_t> right = factor(box[1], box[3], sampling.bin_columns, sizes[level].width);
      Box<value_t>& made = boxes[k];
      made = {level, static_cast<int64_t>(box[0]), {}, {}, {}};
      if (down.samples != 0 && right.samples != 0) {
        made.rows = Taps<value_t>::of_bins(down, static_cast<int>(sampling.bin_rows));
        made.columns = Taps<value_t>::of_bins(right, static_cast<int>(sampling.bin_columns));
        const auto [top, bottom] = places_of(made.rows);
        const auto [left, end_column] = places_of(made.columns);
        made.window = {top, left, bottom, end_column};
      }
      if (made.window.empty()) {  // one axis has no tap, so neither needs any
        made.rows = Taps<value_t>::none(by_cell ? 0 : sampling.bin_rows);
        made.columns = Taps<value_t>::none(by_cell ? 0 : sampling.bin_columns);
        made.window = {};
        continue;
      }
      if (by_cell) {
        made.rows = made.rows.transposed();
        made.columns = made.columns.transposed();
      }
    }
  });
  return boxes;
}

// Boxes of one image of one level, in order, that are computed from one copy of a window.
struct Group {
  int level;
  int64_t image;
  std::vector<int64_t> boxes;
  Window window;
};

// One group for every image of every level.
template <typename AnyBox>
std::vector<Group> groups_of(const std::vector<AnyBox>& boxes, int levels, int64_t images) {
  std::vector<Group> groups(levels * images);
  for (int64_t i = 0; i < levels * images; ++i) groups[i] = {static_cast<int>(i / images), i % images, {}, {}};
  for (size_t k = 0; k < boxes.size(); ++k) {
    Group& group = groups[boxes[k].level * images + boxes[k].image];
    group.boxes.push_back(static_cast<int64_t>(k));
    group.window.include(boxes[k].window);
  }
  return groups;
}

// The same groups; where `keeps(group, cells of its boxes)` is false, each box becomes a group of its own.
template <typename AnyBox, typename Keeps>
std::vector<Group> split_groups(const std::vector<Group>& groups, const std::vector<AnyBox>& boxes,
                                const Keeps& keeps) {
  std::vector<Group> split;
  for (const Group& group : groups) {
    int64_t cells = 0;
    for (int64_t k : group.boxes) cells += boxes[k].window.area();
    if (keeps(group, cells)) {
      split.push_back(group);
      continue;
    }
    for (int64_t k : group.boxes) split.push_back({group.level, group.image, {k}, boxes[k].window});
  }
  return split;
}

}  // namespace fastseg::roi
