// The two factors of a box: the weights of the rows of cells in each row of bins, and of the columns, as sparse
// matrices.
#pragma once

#include <algorithm>
#include <vector>

#include "roi_align/grid.h"

namespace fastseg::roi {

template <typename value_t>
struct Tap {
  int32_t place;  // index of a cell in the map or of a bin in the box
  value_t weight;
};

// A sparse matrix, stored from row `first` to the last row with taps.
template <typename value_t>
class Taps {
 public:
  int32_t first = 0;

  int32_t end() const { return first + static_cast<int32_t>(ends_.size()); }
  const Tap<value_t>* begin_of(int32_t row) const { return taps_.data() + (row == first ? 0 : ends_[row - first - 1]); }
  const Tap<value_t>* end_of(int32_t row) const { return taps_.data() + ends_[row - first]; }

  // A matrix without taps.
  static Taps none(int64_t rows) {
    Taps empty;
    empty.ends_.resize(rows);
    return empty;
  }

  // [bins, cells]: a cell that several samples of a bin read is one tap.
  static Taps of_bins(const Grid<value_t>& grid, int bins) {
    Taps found;
    for (int p = 0; p < bins; ++p) {
      const size_t begin = found.taps_.size();
      const Range range = grid.between(p, -1, grid.size);
      const int64_t count = range.end - range.first;
      for (int64_t i = 0; i < count; ++i) {
        // Cells in ascending order, so that a cell that already has a tap is one of the last two.
        const auto at = grid.sample(p, grid.bin < 0 ? range.end - 1 - i : range.first + i);
        if (!at.inside) continue;
        found.add(begin, at.low, 1 - at.upper);
        found.add(begin, at.low + 1, at.upper);
      }
      for (size_t tap = begin; tap < found.taps_.size(); ++tap) found.taps_[tap].weight /= grid.samples;
      found.ends_.push_back(static_cast<int32_t>(found.taps_.size()));
    }
    return found;
  }

  // The transpose, [cells, bins], bins in order.
  Taps transposed() const {
    Taps result;
    if (taps_.empty()) return result;
    const auto by_place = [](const Tap<value_t>& a, const Tap<value_t>& b) { return a.place < b.place; };
    const auto [low, high] = std::minmax_element(taps_.begin(), taps_.end(), by_place);
    result.first = low->place;
    result.ends_.resize(high->place - low->place + 1);
    result.taps_.resize(taps_.size());
    for (const Tap<value_t>& tap : taps_) ++result.ends_[tap.place - result.first];
    int32_t total = 0;
    for (int32_t& end : result.ends_) total += std::exchange(end, total);  // where each row begins
    for (int32_t bin = first; bin < end(); ++bin) {
      for (const Tap<value_t>* tap = begin_of(bin); tap < end_of(bin); ++tap) {
        result.taps_[result.ends_[tap->place - result.first]++] = {bin, tap->weight};
      }
    }
    return result;
  }

  const std::vector<Tap<value_t>>& all() const { return taps_; }

 private:
  void add(size_t begin, int32_t cell, value_t weight) {
    if (weight == 0) return;  // the cell is not read, so a NaN there does not count
    const size_t count = taps_.size();
    for (size_t back = 1; back <= 2 && back <= count - begin; ++back) {
      if (taps_[count - back].place == cell) {
        taps_[count - back].weight += weight;
        return;
      }
    }
    taps_.push_back({cell, weight});
  }

  std::vector<int32_t> ends_;
  std::vector<Tap<value_t>> taps_;
};

}  // namespace fastseg::roi
