// One call of the op as pointers and numbers, the blocks of its output rows, and the scratch of one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "fastseg/bilinear.h"
#include "fastseg/pixel_tile.h"

namespace upsample_cross_entropy {

using fastseg::BilinearAxis;
using fastseg::ceil_divide;
using fastseg::LabelView;
using fastseg::Scratch;
using simd::f32x16;
using simd::i32x16;
using simd::kLanes;
using simd::u32x16;

constexpr int kBandRows = 8;   // output rows of one source cell that are swept together
constexpr int kMostSteps = 8;  // output pixels of one source cell in a block

// 16 neighbouring source cells (see bilinear.h) in an output row, one per lane. k counts the output pixels inside a
// cell, along which the logits of a lane are linear; a cell with more than kMostSteps pixels takes several blocks.
struct alignas(64) Block {
  float fraction[kMostSteps][kLanes];  // of the pixel between the left and right end of its cell
  int32_t pixel[kMostSteps][kLanes];   // output column, or the output width where the lane has no such pixel
  int64_t cell;                        // of lane 0
  int steps;                           // pixels per lane, 1 to kMostSteps
  bool full;                           // every lane has all its pixels
};

struct Plan {
  std::vector<Block> blocks;
  float step;  // growth of the fraction from one pixel of a cell to the next
};

// Pixels [first, first + steps) of the cells [cell, cell + 16), first counted from each cell's own first pixel.
inline Block make_block(const BilinearAxis& axis, int64_t cell, int64_t first, int steps) {
  Block block{};
  block.cell = cell;
  block.steps = steps;
  for (auto& pixels : block.pixel) std::fill_n(pixels, kLanes, static_cast<int32_t>(axis.output_size));
  for (int lane = 0; lane < kLanes && cell + lane <= axis.source_size; ++lane) {
    const int64_t begin = axis.first[cell + lane] + first, end = axis.first[cell + lane + 1];
    for (int k = 0; k < steps; ++k) {
      if (begin + k < end) {
        block.fraction[k][lane] = axis.fraction[begin + k];
        block.pixel[k][lane] = static_cast<int32_t>(begin + k);
      } else if (begin < end) {  // continues the sequence, so that the lane's exponentials stay finite
        block.fraction[k][lane] = axis.fraction[begin] + static_cast<float>(k * axis.step);
      }
    }
  }
  const auto& last = block.pixel[steps - 1];  // a lane that lacks any pixel lacks the last one
  block.full = std::all_of(last, last + kLanes, [&](int32_t pixel) { return pixel < axis.output_size; });
  return block;
}

inline Plan make_plan(const BilinearAxis& axis) {
  Plan plan;
  plan.step = static_cast<float>(axis.step);
  const int64_t largest = axis.largest_cell(), pieces = ceil_divide(largest, kMostSteps);
  const int steps = static_cast<int>(ceil_divide(largest, pieces));
  for (int64_t cell = axis.cell.front(); cell <= axis.cell.back(); cell += kLanes) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      plan.blocks.push_back(make_block(axis, cell, piece * steps, steps));
    }
  }
  return plan;
}

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
  Strides input_strides;

  LabelView labels;                     // [N, H, W]
  const float* class_weight = nullptr;  // [C] or null
  const float* pixel_weight = nullptr;  // [N, H, W] or null
  float label_smoothing = 0;
  float class_weight_sum = 0;  // C where class_weight is null

  const float* grad_losses = nullptr;  // [N, H, W] or null, which stands for grad_numerator everywhere
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
  bool basic() const { return !class_weight && !pixel_weight && !grad_losses && label_smoothing == 0; }

  // A row of labels, and padding for lanes without pixels.
  int64_t label_stride() const { return width() + kMostSteps; }

  // Floats of one padded source row of one class: the row between copies of its ends, and padding for the last block.
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

// Numbers of the pixels of one block in one output row, all [steps][16]. The coefficients of the gradient are 0 where
// the label is ignored, except that basic() problems have one for all pixels, set once.
struct alignas(64) PixelTile {
  f32x16 through[kMostSteps];  // coefficient of every probability
  f32x16 target[kMostSteps];   // coefficient of the label's one
  f32x16 smooth[kMostSteps];   // coefficient of the class weights, label smoothing only
  f32x16 sum[kMostSteps];      // of e^(logit - normaliser) over the classes
  f32x16 norm[kMostSteps];     // normaliser: no smaller than any logit
  f32x16 dice[kMostSteps];     // sum_c h_c e_c^2 (or h_c e_c)
  f32x16 common[kMostSteps];   // Dice gradient: factor of every probability
  f32x16 inverse[kMostSteps];  // factor from exponentials to probabilities (or their gradients)
  i32x16 label[kMostSteps];    // -1 where ignored or no pixel
  ClassSet classes;            // of the labels
};

// Scratch of one thread. Rows are padded: index q holds source column q - 1.
struct Workspace {
  explicit Workspace(const Problem& problem)
      : stride(problem.row_stride()), rows(4 * problem.classes * stride), logits(2 * kLanes * problem.classes),
        accumulators(wants_gradient(problem.task) ? 4 * kLanes * problem.classes : 0),
        statistics(problem.task == Task::kStatistics ? 3 * kLanes * problem.classes : 0),
        labels(kBandRows * problem.label_stride()) {
    const int64_t size = problem.classes * stride;
    std::fill_n(rows.get(), 4 * size, 0.0f);
    if (problem.basic()) {
      std::fill_n(tile.through, kMostSteps, simd::splat(problem.grad_numerator));
      std::fill_n(tile.target, kMostSteps, simd::splat(problem.grad_numerator));
    }
    upper = rows.get();
    lower = upper + size;
    gradient_upper = lower + size;
    gradient_lower = gradient_upper + size;
    intersection = statistics.get();
    prediction = intersection + kLanes * problem.classes;
    truth = prediction + kLanes * problem.classes;
  }

  int64_t stride;
  Scratch<float> rows;
  Scratch<float> logits;        // [C][2][16]: ends of the cells, vertically interpolated; then start and ratio
  Scratch<float> accumulators;  // [C][4][16]: gradients of the left and right ends, then the lower row's shares
  Scratch<float> statistics;
  Scratch<int32_t> labels;  // [kBandRows][label_stride()], -1 past the end of the row
  PixelTile tile{};

  float* upper;           // [C][stride] source row above the output rows
  float* lower;           // [C][stride] source row below them
  float* gradient_upper;  // [C][stride]
  float* gradient_lower;  // [C][stride]
  float* intersection;    // [C][16] sum of p y
  float* prediction;      // [C][16] sum of p^2 or p
  float* truth;           // [C][16] pixels
};

}  // namespace upsample_cross_entropy
