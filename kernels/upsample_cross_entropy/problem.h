// One call of the op as plain pointers, and the scratch of one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "fastseg/bilinear.h"
#include "fastseg/pixel_tile.h"
#include "plan.h"

namespace upsample_cross_entropy {

using fastseg::LabelView;
using fastseg::Scratch;

constexpr int kBandRows = 8;  // output rows of one source cell that are swept together
constexpr int kMostRows = 2;  // of them, that are computed at once
constexpr int kNoLabel = 255;
constexpr int kMostPixels = kMostRows * kMostSteps;

enum class Task {
  kLoss,                // the cross-entropy: its sums, or every pixel's loss
  kGradient,            // d cross-entropy / d input, and the sums
  kStatistics,          // Dice statistics and the sums of the cross-entropy
  kStatisticsGradient,  // d (a function of all those) / d input
};

constexpr bool wants_gradient(Task task) { return task == Task::kGradient || task == Task::kStatisticsGradient; }
constexpr bool wants_dice(Task task) { return task == Task::kStatistics || task == Task::kStatisticsGradient; }

// Strides in elements of an [N, C, h, w] tensor.
struct Strides {
  int64_t image, channel, row, column;
};

struct Problem {
  Task task;
  bool squared = true;  // Dice: sum p^2 rather than sum p
  int64_t images, classes;
  BilinearAxis vertical, horizontal;
  Plan plan;

  // Writes row `row` of image `image`, all classes, to padded[c * stride + x].
  void (*read_row)(const Problem& problem, int64_t image, int64_t row, float* padded, int64_t stride);
  const void* input;  // [N, C, h, w]
  bool half_digits;   // the input is of a half type: no more digits are needed than such a type holds
  Strides input_strides;

  LabelView labels;                      // [N, H, W]
  uint8_t* label_bytes = nullptr;        // [N, H, W] or null: where to put them for a second pass, kNoLabel for ignored
  const float* class_weight = nullptr;   // [C] or null
  const float* pixel_weight = nullptr;   // [N, H, W] or null
  float label_smoothing = 0;
  float class_weight_sum = 0;            // C where class_weight is null

  const float* grad_losses = nullptr;    // [N, H, W] or null, which stands for grad_numerator everywhere
  int64_t grad_losses_strides[3] = {};
  float grad_numerator = 1;
  const float* grad_intersection = nullptr;  // [N, C]
  const float* grad_prediction = nullptr;    // [N, C], already times 2 when squared

  float* losses = nullptr;    // [N, H, W] or null
  float* gradient = nullptr;  // [N, C, h, w], zeros at first
  Strides gradient_strides{};

  int64_t source_height() const { return vertical.source_size; }
  int64_t source_width() const { return horizontal.source_size; }
  int64_t height() const { return vertical.output_size; }
  int64_t width() const { return horizontal.output_size; }
  float weight_of(int64_t c) const { return class_weight ? class_weight[c] : 1.0f; }
  bool plain() const { return !class_weight && !pixel_weight && !grad_losses && label_smoothing == 0; }

  // A row of labels and room for the lanes of a block that has no pixels there.
  int64_t label_stride() const { return width() + kMostSteps; }

  // Floats of one padded source row of one class: the row between copies of its ends, and room for the last block.
  int64_t row_stride() const {
    const int64_t vectors = ceil_divide(source_width() + 2, kLanes) + 2;
    return (vectors | 1) * kLanes;  // odd: rows of different classes do not compete for the same cache sets
  }
};

// Classes that occur, as sets of labels % 32 and of labels / 32 % 32: with more than 32 classes it may name others.
struct ClassSet {
  uint32_t modulo_32 = 0, words = 0;

  bool empty() const { return words == 0; }
};

// What is known of the pixels of one block in one or two output rows, all [rows][steps][16]. The coefficients of the
// gradient are 0 where the label is ignored, except that plain() problems have one for all pixels, set once.
struct alignas(64) PixelTile {
  f32x16 through[kMostPixels];  // coefficient of every probability
  f32x16 target[kMostPixels];   // coefficient of the label's one
  f32x16 smooth[kMostPixels];   // coefficient of the class weights, label smoothing only
  f32x16 sum[kMostPixels];      // of e^(logit - normaliser) over the classes
  f32x16 norm[kMostPixels];     // normaliser: no smaller than any logit
  f32x16 dice[kMostPixels];     // sum_c h_c e_c^2 (or h_c e_c)
  f32x16 common[kMostPixels];   // Dice gradient: what every probability is multiplied by
  f32x16 inverse[kMostPixels];  // factor that makes exponentials into probabilities (or their gradients)
  i32x16 label[kMostPixels];    // -1 where ignored or no pixel
  ClassSet classes;             // of the labels
};

// What the rows of a band share while their exponentials grow from row to row (row_growth.h).
struct alignas(64) RowGrowth {
  bool active = false;
  f32x16 highest[4];   // largest logit at the cells' corners: upper left and right, lower left and right
  f32x16 weighted[4];  // sum_c w_c logit_c there, label smoothing only
  int64_t first_row;   // of the band
  ClassSet classes;    // of the band's labels that `label_counts` holds
};

// Scratch of one thread. Rows are padded: index q holds source column q - 1.
struct Workspace {
  explicit Workspace(const Problem& problem)
      : stride(problem.row_stride()),
        rows(4 * problem.classes * stride),
        logits(2 * kLanes * problem.classes),
        growth_factors(problem.half_digits ? 2 * kLanes * problem.classes : 0),
        label_counts(problem.half_digits ? 2 * kLanes * problem.classes : 0),
        extremes(problem.half_digits ? 6 * stride : 0),
        accumulators(wants_gradient(problem.task) ? 4 * kLanes * problem.classes : 0),
        statistics(problem.task == Task::kStatistics ? 3 * kLanes * problem.classes : 0),
        labels(kBandRows * problem.label_stride()) {
    const int64_t size = problem.classes * stride;
    std::fill_n(rows.get(), 4 * size, 0.0f);
    if (problem.plain()) {
      std::fill_n(tile.through, kMostPixels, simd::splat(problem.grad_numerator));
      std::fill_n(tile.target, kMostPixels, simd::splat(problem.grad_numerator));
    }
    if (problem.half_digits) std::fill_n(label_counts.get(), 2 * kLanes * problem.classes, 0);
    upper = rows.get();
    lower = upper + size;
    upper_extremes = extremes.get();
    lower_extremes = upper_extremes + 3 * stride;
    gradient_upper = lower + size;
    gradient_lower = gradient_upper + size;
    intersection = statistics.get();
    prediction = intersection + kLanes * problem.classes;
    truth = prediction + kLanes * problem.classes;
  }

  int64_t stride;
  Scratch<float> rows;
  Scratch<float> logits;        // [C][2][16]: ends of the cells, vertically interpolated; then start and ratio
  Scratch<float> growth_factors;  // [C][2][16]: of start and ratio from one row to the next
  Scratch<int32_t> label_counts;  // [C][2][16]: band_labels.h
  Scratch<float> extremes;
  Scratch<float> accumulators;  // [C][4][16]: gradients of the left and right ends, then the lower row's shares
  Scratch<float> statistics;
  Scratch<int32_t> labels;      // [kBandRows][label_stride()], -1 behind the row
  PixelTile tile{};
  RowGrowth growth;

  float* upper;           // [C][stride] source row above the output rows
  float* lower;           // [C][stride] source row below them
  float* upper_extremes;  // [3][stride] half types: largest and smallest logit of a column, 0 or NaN if not finite
  float* lower_extremes;  // [3][stride]
  float* gradient_upper;  // [C][stride]
  float* gradient_lower;  // [C][stride]
  float* intersection;    // [C][16] sum of p y
  float* prediction;      // [C][16] sum of p^2 or p
  float* truth;           // [C][16] pixels
};

// fn(integral constant of the block's kind of cells)
template <typename Function>
FASTSEG_INLINE auto with_cells(const Block& block, const Function& fn) {
  if (block.cells == Cells::neighbours) return fn(std::integral_constant<Cells, Cells::neighbours>());
  if (block.cells == Cells::close) return fn(std::integral_constant<Cells, Cells::close>());
  return fn(std::integral_constant<Cells, Cells::anywhere>());
}

// row[cell] for the block's cells.
template <Cells cells>
FASTSEG_INLINE f32x16 read_row(const Block& block, const float* row) {
  if constexpr (cells == Cells::neighbours) return simd::load(row + block.cell[0]);
  const i32x16 cell = simd::load(block.cell);
  if constexpr (cells == Cells::anywhere) return simd::gather(row, cell);
  return simd::permute(row + block.cell[0], cell - block.cell[0]);
}

}  // namespace upsample_cross_entropy
