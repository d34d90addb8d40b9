// Labels the bands of a tile: a class is interpolated horizontally once per block of 16 columns and band of
// rows (geometry.h); each row of the band then costs one multiply-add, one comparison and two selections per
// 16 pixels and class.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/bilinear.h"
#include "fastseg/simd.h"
#include "upsample_argmax/geometry.h"

namespace fastseg::upsample_argmax {

using simd::i64x16;
using simd::u8x16;
using torch::headeronly::ScalarType;

// Output rows labelled together: their maxima and labels should stay in registers.
constexpr int kRows = simd::kRegisterBytes == 64 ? 8 : 2;
constexpr float kTame = 1e37f;  // differences of logits of at most this size are finite

struct Problem {
  const void* input;  // [N, C, h, w] of `dtype`, any strides
  ScalarType dtype;
  int64_t images, classes, height, width;
  int64_t image_stride, class_stride, row_stride, column_stride;
  int64_t out_height, out_width;
  std::vector<float> row_fraction;  // [H] weight of the lower source row
  std::vector<Band> bands;
  std::vector<Block> blocks;
  std::vector<Tile> tiles;
  int64_t pitch;  // staged elements per class: every tile's columns and at least 17 more, whole vectors
  bool prune;     // whether pruning pays and no softmax is wanted (it needs every class)
  bool stream;
  uint8_t* byte_labels;  // [N, H, W], or null
  int64_t* long_labels;  // [N, H, W], or null
  float* probability;    // [N, H, W], or null
};

// One source row of a tile in the accumulator type, contiguous per class.
struct StagedRow {
  std::vector<f32x16> storage;  // [C, pitch]
  int64_t row = -1;
  bool tame = false;  // every value is finite and no larger than kTame

  const float* of_class(int64_t c, int64_t pitch) const {
    return reinterpret_cast<const float*>(storage.data()) + c * pitch;
  }
};

// Labels the bands of one tile of one image at a time; one object per thread.
class Labeller {
 public:
  explicit Labeller(const Problem& problem)
      : problem_(problem), live_((problem.pitch / kLanes + 1) * problem.classes), all_(problem.classes),
        chosen_(problem.classes), expanded_(2 * problem.classes) {
    upper_.storage.resize(problem.classes * problem.pitch / kLanes);
    lower_.storage.resize(problem.classes * problem.pitch / kLanes);
    std::iota(all_.begin(), all_.end(), 0);
  }

  void label(int64_t image, const Tile& tile, int64_t band_begin, int64_t band_end) {
    upper_.row = lower_.row = -1;
    for (int64_t i = band_begin; i < band_end; ++i) {
      const Band& band = problem_.bands[i];
      if (upper_.row != band.top && lower_.row == band.top) std::swap(upper_, lower_);
      if (upper_.row != band.top) stage(upper_, image, band.top, tile);
      if (lower_.row != band.bottom) stage(lower_, image, band.bottom, tile);
      const bool tame = upper_.tame && lower_.tame;
      const bool prune = problem_.prune && tame;
      if (prune) find_live(tile.columns);
      for (int64_t b = tile.begin; b < tile.end; ++b) {
        const Block& block = problem_.blocks[b];
        const int64_t column = block.column - tile.column;
        const int32_t* classes = all_.data();
        int64_t count = problem_.classes;
        if (prune) {
          count = choose_live(column, block.cells);
          classes = chosen_.data();
        }
        if (count == 1 && problem_.probability == nullptr) {
          const i32x16 label = simd::splat(classes[0]);
          for (int64_t y = band.begin; y < band.end; ++y) write_labels(image, y, b * kLanes, label);
        } else if (tame) {
          label_block<true>(image, band, block, b * kLanes, column, classes, count);
        } else {
          label_block<false>(image, band, block, b * kLanes, column, classes, count);
        }
      }
    }
  }

 private:
  // --- source rows ---

  void stage(StagedRow& staged, int64_t image, int64_t row, const Tile& tile) {
    staged.row = row;
    const int64_t offset =
        image * problem_.image_stride + row * problem_.row_stride + tile.column * problem_.column_stride;
    float* to = reinterpret_cast<float*>(staged.storage.data());
    switch (problem_.dtype) {
      case ScalarType::Half: copy_row(static_cast<const simd::Half*>(problem_.input) + offset, tile.columns, to); break;
      case ScalarType::BFloat16:
        copy_row(static_cast<const simd::BFloat16*>(problem_.input) + offset, tile.columns, to);
        break;
      default: copy_row(static_cast<const float*>(problem_.input) + offset, tile.columns, to);
    }
    i32x16 wild{};
    for (const f32x16& lanes : staged.storage) {
      const f32x16 magnitude = simd::select(lanes < 0.0f, -lanes, lanes);
      wild |= ~(magnitude <= kTame);
    }
    staged.tame = !simd::any(wild);
  }

  // from: [C, columns] by class_stride and column_stride; to: [C, pitch], the last column repeated to the end.
  template <typename scalar_t>
  void copy_row(const scalar_t* from, int64_t columns, float* to) const {
    const int64_t pitch = problem_.pitch;
    if (problem_.column_stride == 1) {
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const scalar_t* source = from + c * problem_.class_stride;
        int64_t j = 0;
        for (; j + kLanes <= columns; j += kLanes) simd::store(to + c * pitch + j, simd::load(source + j));
        for (; j < columns; ++j) to[c * pitch + j] = static_cast<float>(source[j]);
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        const scalar_t* source = from + j * problem_.column_stride;
        for (int64_t c = 0; c < problem_.classes; ++c) {
          to[c * pitch + j] = static_cast<float>(source[c * problem_.class_stride]);
        }
      }
    }
    for (int64_t c = 0; c < problem_.classes; ++c) {
      std::fill(to + c * pitch + columns, to + (c + 1) * pitch, to[c * pitch + columns - 1]);
    }
  }

  // --- pruning ---

  // Marks, for every cell and class, whether the class is at least as large as the cell's champion (the class that is
  // largest in the middle of the cell) at one of the four corners. A class smaller at all four is smaller everywhere.
  void find_live(int64_t columns) {
    const int64_t classes = problem_.classes, pitch = problem_.pitch;
    for (int64_t j = 0; j < columns; j += kLanes) {
      f32x16 best = simd::splat(-INFINITY), best_corner[4] = {best, best, best, best};
      for (int64_t c = 0; c < classes; ++c) {
        f32x16 corner[4];
        load_corners(c, j, corner);
        const f32x16 middle = (corner[0] + corner[1]) + (corner[2] + corner[3]);
        const i32x16 above = middle > best;
        best = simd::select(above, middle, best);
        for (int i = 0; i < 4; ++i) best_corner[i] = simd::select(above, corner[i], best_corner[i]);
      }
      uint16_t* live = live_.data() + j / kLanes * classes;
      for (int64_t c = 0; c < classes; ++c) {
        const float* upper = upper_.of_class(c, pitch) + j;
        const float* lower = lower_.of_class(c, pitch) + j;
        const i32x16 reaches = (simd::load(upper) >= best_corner[0]) | (simd::load(upper + 1) >= best_corner[1]) |
                               (simd::load(lower) >= best_corner[2]) | (simd::load(lower + 1) >= best_corner[3]);
        live[c] = static_cast<uint16_t>(simd::mask_bits(reaches));
      }
    }
  }

  void load_corners(int64_t c, int64_t j, f32x16* corner) const {
    const float* upper = upper_.of_class(c, problem_.pitch) + j;
    const float* lower = lower_.of_class(c, problem_.pitch) + j;
    corner[0] = simd::load(upper);
    corner[1] = simd::load(upper + 1);
    corner[2] = simd::load(lower);
    corner[3] = simd::load(lower + 1);
  }

  // Writes to chosen_ the classes live in any of the cells (at most 16), ascending, and returns their number.
  int64_t choose_live(int64_t column, int64_t cells) {
    const uint32_t wanted = ((1u << cells) - 1) << (column % kLanes);
    const uint32_t wanted_here = wanted & 0xffffu, wanted_next = wanted >> kLanes;
    const uint16_t* here = live_.data() + column / kLanes * problem_.classes;
    const uint16_t* next = here + problem_.classes;
    int64_t count = 0;
    for (int64_t c = 0; c < problem_.classes; ++c) {
      chosen_[count] = static_cast<int32_t>(c);
      count += ((here[c] & wanted_here) | (next[c] & wanted_next)) != 0;
    }
    return count;
  }

  // --- one block of one band ---

  // tame: interpolates as top + fraction * (bottom - top). Otherwise with two weights, and NaN is above every number,
  // as in PyTorch, since the difference of infinities is not a number.
  template <bool tame>
  void label_block(int64_t image, const Band& band, const Block& block, int64_t x, int64_t column,
                   const int32_t* classes, int64_t count) {
    if (block.narrow) {
      expand<tame, true>(block, column, classes, count);
    } else {
      expand<tame, false>(block, column, classes, count);
    }
    int64_t y = band.begin;
    while (y < band.end) {
      const int64_t left = band.end - y;
      if (left > kRows / 2) {
        y += label_rows<tame, kRows>(image, y, std::min<int64_t>(left, kRows), x, classes, count);
      } else if (left > 1) {
        y += label_rows<tame, kRows / 2>(image, y, left, x, classes, count);
      } else {
        y += label_rows<tame, 1>(image, y, left, x, classes, count);
      }
    }
  }

  // Interpolates the two source rows horizontally: expanded_[2 i] is the upper one of classes[i], expanded_[2
  // i + 1] the lower one (its difference to the upper one if tame).
  template <bool tame, bool narrow>
  void expand(const Block& block, int64_t column, const int32_t* classes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const f32x16 upper = interpolate<tame, narrow>(upper_.of_class(classes[i], problem_.pitch) + column, block);
      const f32x16 lower = interpolate<tame, narrow>(lower_.of_class(classes[i], problem_.pitch) + column, block);
      expanded_[2 * i] = upper;
      expanded_[2 * i + 1] = tame ? lower - upper : lower;
    }
  }

  template <bool tame, bool narrow>
  static f32x16 interpolate(const float* row, const Block& block) {
    const f32x16 left = narrow ? simd::permute(row, block.low) : simd::gather(row, block.low);
    const f32x16 right = narrow ? simd::permute(row, block.high) : simd::gather(row, block.high);
    return blend<tame>(left, tame ? right - left : right, block.fraction);
  }

  template <bool tame, typename fraction_t>
  static f32x16 blend(f32x16 first, f32x16 second, fraction_t fraction) {
    if constexpr (tame) return first + second * fraction;
    return first * (1.0f - fraction) + second * fraction;
  }

  // Labels rows y .. y + used - 1 (used <= rows) of a block; returns `used`.
  template <bool tame, int rows>
  int64_t label_rows(int64_t image, int64_t y, int64_t used, int64_t x, const int32_t* classes, int64_t count) {
    float fraction[rows];
    f32x16 best[rows];
    i32x16 label[rows];
    for (int k = 0; k < rows; ++k) {
      fraction[k] = problem_.row_fraction[y + std::min<int64_t>(k, used - 1)];
      best[k] = simd::splat(-INFINITY);
      label[k] = simd::splat(classes[0]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const f32x16 first = expanded_[2 * i], second = expanded_[2 * i + 1];
      const i32x16 candidate = simd::splat(classes[i]);
#pragma GCC unroll 8
      for (int k = 0; k < rows; ++k) {
        const f32x16 value = blend<tame>(first, second, fraction[k]);
        i32x16 above = value > best[k];
        if constexpr (!tame) above |= (value != value) & (best[k] == best[k]);
        best[k] = simd::select(above, value, best[k]);
        label[k] = simd::select(above, candidate, label[k]);
      }
    }
    for (int k = 0; k < used; ++k) write_labels(image, y + k, x, label[k]);
    if (problem_.probability != nullptr) {
      for (int k = 0; k < used; ++k) write_probability<tame>(image, y + k, x, best[k], fraction[k], count);
    }
    return used;
  }

  // The softmax of the largest logit: 1 / sum over the classes of exp(logit - largest).
  template <bool tame>
  void write_probability(int64_t image, int64_t y, int64_t x, f32x16 largest, float fraction, int64_t count) const {
    f32x16 sum{};
    for (int64_t i = 0; i < count; ++i) {
      sum += simd::exp_nonpositive(blend<tame>(expanded_[2 * i], expanded_[2 * i + 1], fraction) - largest);
    }
    const int64_t offset = (image * problem_.out_height + y) * problem_.out_width + x;
    write_lanes(problem_.probability + offset, 1.0f / sum, problem_.out_width - x);
  }

  void write_labels(int64_t image, int64_t y, int64_t x, i32x16 label) const {
    const int64_t offset = (image * problem_.out_height + y) * problem_.out_width + x;
    const int64_t lanes = problem_.out_width - x;
    if (problem_.byte_labels != nullptr) {
      write_lanes(problem_.byte_labels + offset, simd::convert<u8x16>(label), lanes);
    } else if (problem_.stream && lanes >= kLanes && simd::is_aligned(problem_.long_labels + offset)) {
      simd::stream(problem_.long_labels + offset, simd::convert<i64x16>(label));
    } else {
      write_lanes(problem_.long_labels + offset, simd::convert<i64x16>(label), lanes);
    }
  }

  template <typename output_t, typename lanes_t>
  static void write_lanes(output_t* to, lanes_t lanes, int64_t count) {
    if (count >= kLanes) {
      simd::store(to, lanes);
    } else {
      simd::store_partial(to, lanes, static_cast<int>(count));
    }
  }

  const Problem& problem_;
  StagedRow upper_, lower_;
  std::vector<uint16_t> live_;    // [pitch / 16 + 1, C] bit j: the class is live in the j-th of 16 cells
  std::vector<int32_t> all_;      // [C] 0, 1, 2, ...
  std::vector<int32_t> chosen_;   // [C] classes live in the block
  std::vector<f32x16> expanded_;  // [C, 2] horizontally interpolated source rows of a block
};

}  // namespace fastseg::upsample_argmax
