// Polygons as packed masks by COCO's rule. reference.py is the definition; README.md explains how crossings are found
// without the walk.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "fastseg/dense.h"
#include "fastseg/parallel.h"

namespace fastseg {
namespace {

constexpr int64_t kScale = 5;   // steps in a pixel
constexpr int64_t kBefore = 2;  // the last step of a column before its centre line
constexpr int64_t kWord = 32;
constexpr double kFarthest = 1e8;  // pixels

struct Point {
  int64_t x, y;  // in steps
};

// Bits of one polygon [height, words], set where a column changes between inside and outside, and the range in use.
class Crossings {
 public:
  Crossings(int64_t height, int64_t width)
      : height_(height), width_(width), words_(ceil_divide(width, kWord)), bits_(height * words_) {}

  void add_line(Point from, Point to) {
    const int64_t across = std::abs(to.x - from.x), down = std::abs(to.y - from.y);
    const bool wide = across >= down;
    if (wide ? from.x > to.x : from.y > to.y) std::swap(from, to);
    if (from.x == to.x) return;
    const double slope = wide ? static_cast<double>(to.y - from.y) / across : static_cast<double>(to.x - from.x) / down;
    const auto side = [&](int64_t t) {  // the other coordinate after t steps along the longer axis
      return static_cast<int64_t>((wide ? from.y : from.x) + slope * t + 0.5);
    };
    const int64_t low = std::min(from.x, to.x), high = std::max(from.x, to.x);
    const int64_t first = std::max<int64_t>(0, -floor_divide(kBefore - low, kScale));
    const int64_t last = std::min(width_ - 1, floor_divide(high - 1 - kBefore, kScale));
    for (int64_t column = first; column <= last; ++column) {
      const int64_t before = column * kScale + kBefore;  // the line lies between this step and the next
      if (wide) {
        const int64_t t = before - from.x;
        add(column, std::min(side(t), side(t + 1)));
      } else {
        // The first t at which x is on the other side, searched from the crossing of the unrounded line.
        const auto beyond = [&](int64_t t) { return slope > 0 ? side(t) > before : side(t) <= before; };
        int64_t t = static_cast<int64_t>((before + 0.5 - from.x) / slope);
        t = std::clamp<int64_t>(t, 1, down);
        while (t < down && !beyond(t)) ++t;
        while (t > 1 && beyond(t - 1)) --t;
        add(column, from.y + t - 1);
      }
    }
  }

  // ORs the inside into words [height, words] and clears the bits.
  void fill(uint32_t* words) {
    for (int64_t y = first_row_; y <= last_row_; ++y) {
      uint32_t* const row = bits_.data() + y * words_;
      for (int64_t w = first_word_; w <= last_word_; ++w) {
        if (y > first_row_) row[w] ^= row[w - words_];
        words[y * words_ + w] |= row[w];
      }
    }
    for (int64_t y = first_row_; y <= last_row_; ++y) {
      std::fill(bits_.begin() + y * words_ + first_word_, bits_.begin() + y * words_ + last_word_ + 1, 0);
    }
    first_row_ = first_word_ = INT64_MAX;
    last_row_ = last_word_ = -1;
  }

 private:
  void add(int64_t column, int64_t step) {
    const double row = std::ceil((step + 0.5) / kScale - 0.5);
    const int64_t y = static_cast<int64_t>(std::clamp<double>(row, 0, height_));
    last_row_ = std::max(last_row_, std::min(y, height_ - 1));  // all rows below it are outside
    if (y == height_) return;
    const int64_t word = column / kWord;
    bits_[y * words_ + word] ^= uint32_t{1} << column % kWord;
    first_row_ = std::min(first_row_, y);
    first_word_ = std::min(first_word_, word), last_word_ = std::max(last_word_, word);
  }

  int64_t height_, width_, words_;
  std::vector<uint32_t> bits_;
  int64_t first_row_ = INT64_MAX, last_row_ = -1, first_word_ = INT64_MAX, last_word_ = -1;
};

void fill_polygons(const Tensor& points, const Tensor& ends, const Tensor& objects, int64_t count, int64_t height,
                   int64_t width, const Tensor& words) {
  const int64_t polygons = ends.numel();
  FASTSEG_CHECK(points.dim() == 2 && points.size(1) == 2, "points must be [P, 2]");
  const double* corners = dense_values<double>(points, points.numel(), "points");
  const int64_t* end = dense_values<int64_t>(ends, polygons, "ends");
  const int64_t* object = dense_values<int64_t>(objects, polygons, "objects");
  FASTSEG_CHECK(words.is_cpu() && words.is_contiguous() && words.scalar_type() == ScalarType::Int && words.dim() == 3 &&
                    width >= 0 && words.size(0) == count && words.size(1) == height &&
                    words.size(2) == ceil_divide(width, kWord),
                "words must be int32 [count, height, ceil(width / 32)] on the CPU");
  std::vector<int64_t> first(count + 1, polygons);  // polygon of each object
  for (int64_t p = polygons - 1; p >= 0; --p) {
    FASTSEG_CHECK(end[p] >= (p ? end[p - 1] : 0) && end[p] <= points.size(0), "ends must rise to the number of points");
    FASTSEG_CHECK(object[p] >= 0 && object[p] < count && (p + 1 == polygons || object[p] <= object[p + 1]),
                  "objects must rise, below count");
    first[object[p]] = p;
  }
  for (int64_t i = count - 1; i >= 0; --i) first[i] = std::min(first[i], first[i + 1]);
  for (int64_t i = 0; i < points.numel(); ++i) {
    FASTSEG_CHECK(std::abs(corners[i]) <= kFarthest, "points must lie within 1e8 pixels");
  }
  const int64_t size = words.size(1) * words.size(2);
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  if (words.numel() == 0) return;
  const UnevenSlices slices(count);
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t last) {
    Crossings crossings(height, width);
    for (int64_t i = begin; i < last; ++i) {
      std::fill_n(to + i * size, size, 0);
      for (int64_t p = first[i]; p < first[i + 1]; ++p) {
        const int64_t own = p ? end[p - 1] : 0, corner_count = end[p] - own;
        const auto at = [&](int64_t c) {
          const double* corner = corners + (own + c % corner_count) * 2;
          return Point{static_cast<int64_t>(kScale * corner[0] + 0.5), static_cast<int64_t>(kScale * corner[1] + 0.5)};
        };
        for (int64_t c = 0; c < corner_count; ++c) crossings.add_line(at(c), at(c + 1));
        crossings.fill(to + i * size);
      }
    }
  });
}

}  // namespace
}  // namespace fastseg

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) { m.impl("_fill_polygons", TORCH_BOX(&fastseg::fill_polygons)); }
