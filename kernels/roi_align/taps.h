// The two factors of a box: what each bin takes from each row of cells, and from each column, as sparse matrices.
#pragma once

#include <algorithm>
#include <vector>

#include "roi_align/grid.h"

namespace fastseg::roi {

template <typename value_t>
struct Tap {
  int32_t place;  // of a cell in the map, of a bin in the box
  value_t weight;
};

// The rows of a sparse matrix from row `first` on; all others are empty.
template <typename value_t>
class Taps {
 public:
  int32_t first = 0;

  int32_t end() const { return first + static_cast<int32_t>(ends_.size()); }
  const Tap<value_t>* begin_of(int32_t row) const { return taps_.data() + (row == first ? 0 : ends_[row - first - 1]); }
  const Tap<value_t>* end_of(int32_t row) const { return taps_.data() + ends_[row - first]; }

  // Without taps.
  static Taps none(int64_t rows) {
    Taps empty;
    empty.ends_.resize(rows);
    return empty;
  }

  // [bins, cells]: a cell that several samples of a bin touch is one tap.
  static Taps of_bins(const Grid<value_t>& grid, int bins) {
    Taps found;
    for (int p = 0; p < bins; ++p) {
      const size_t begin = found.taps_.size();
      const Range range = grid.between(p, -1, grid.size);
      const int64_t count = range.end - range.first;
      for (int64_t i = 0; i < count; ++i) {
        // From low cells to high ones, so that a cell already met is one of the last two.
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
    Taps turned;
    if (taps_.empty()) return turned;
    const auto by_place = [](const Tap<value_t>& a, const Tap<value_t>& b) { return a.place < b.place; };
    const auto [low, high] = std::minmax_element(taps_.begin(), taps_.end(), by_place);
    turned.first = low->place;
    turned.ends_.resize(high->place - low->place + 1);
    turned.taps_.resize(taps_.size());
    for (const Tap<value_t>& tap : taps_) ++turned.ends_[tap.place - turned.first];
    int32_t total = 0;
    for (int32_t& end : turned.ends_) total += std::exchange(end, total);  // where each row begins
    for (int32_t bin = first; bin < end(); ++bin) {
      for (const Tap<value_t>* tap = begin_of(bin); tap < end_of(bin); ++tap) {
        turned.taps_[turned.ends_[tap->place - turned.first]++] = {bin, tap->weight};
      }
    }
    return turned;
  }

  const std::vector<Tap<value_t>>& all() const { return taps_; }

 private:
  void add(size_t begin, int32_t cell, value_t weight) {
    if (weight == 0) return;  // what lies there, NaN included, is not looked at
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
