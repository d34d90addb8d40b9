// Walks the output rows: one thread takes consecutive rows, band by band, a band being up to eight rows of one vertical
// cell, block by block.
#pragma once

#include "block_row.h"
#include "source_rows.h"

namespace upsample_cross_entropy {

struct Totals {
  double numerator = 0, denominator = 0;
  std::vector<double> statistics;  // [3][N][C]: intersection, prediction, truth
  bool labels_in_range = true;
};

class Slice {
 public:
  Slice(const Problem& problem, int64_t first_row, int64_t last_row)
      : problem_(problem), first_row_(first_row), last_row_(last_row) {}

  void run(Workspace& work) {
    const int64_t height = problem_.height();
    if (first_row_ > 0 && first_row_ < last_row_ && wants_gradient(problem_.task)) {
      const int64_t y = first_row_ % height, cell = problem_.vertical.cell[y];
      gradient_.open(problem_, first_row_ / height, cell, y > problem_.vertical.first[cell]);
    }
    for (int64_t row = first_row_; row < last_row_;) {
      const int64_t image = row / height, y = row % height, cell = problem_.vertical.cell[y];
      const int64_t end_of_cell = image * height + problem_.vertical.first[cell + 1];
      const int64_t count = std::min({static_cast<int64_t>(kBandRows), end_of_cell - row, last_row_ - row});
      if (image != image_ || cell != cell_) move_to(work, image, cell);
      band(work, y, static_cast<int>(count));
      row += count;
    }
    leave(work, false);
  }

  void add_to(Totals& totals) const {
    totals.numerator += numerator_;
    totals.denominator += denominator_;
    totals.labels_in_range &= labels_in_range_;
    for (size_t i = 0; i < statistics_.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / problem_.classes, c = static_cast<int64_t>(i) % problem_.classes;
      const int64_t image = first_image_ + row / 3, statistic = row % 3;
      totals.statistics[(statistic * problem_.images + image) * problem_.classes + c] += statistics_[i];
    }
    if (wants_gradient(problem_.task)) gradient_.add_kept(problem_);
  }

 private:
  void move_to(Workspace& work, int64_t image, int64_t cell) {
    const bool adjacent = image == image_ && cell == cell_ + 1;
    leave(work, adjacent);
    if (image != image_ && problem_.task == Task::kStatistics) enter_image(work, image);
    read_rows(problem_, work, image, cell, adjacent);
    image_ = image;
    cell_ = cell;
  }

  // Adds the gradients of the current cell's rows to the result; the lower row is the upper row of an adjacent next
  // cell.
  void leave(Workspace& work, bool adjacent) {
    if (!wants_gradient(problem_.task)) return;
    const int64_t size = problem_.classes * work.stride;
    if (image_ >= 0) {
      gradient_.add(problem_, image_, problem_.vertical.left(cell_), work.gradient_upper, work.stride);
      if (adjacent) {
        std::swap(work.gradient_upper, work.gradient_lower);
        std::fill_n(work.gradient_lower, size, 0.0f);
        return;
      }
      gradient_.add(problem_, image_, problem_.vertical.right(cell_), work.gradient_lower, work.stride);
    }
    std::fill_n(work.gradient_upper, size, 0.0f);
    std::fill_n(work.gradient_lower, size, 0.0f);
  }

  void enter_image(Workspace& work, int64_t image) {
    if (statistics_.empty()) first_image_ = image;
    std::fill_n(work.intersection, 3 * kLanes * problem_.classes, 0.0f);
    statistics_.resize(statistics_.size() + 3 * problem_.classes, 0.0);
  }

  // Adds the single-precision sums of the lanes to the double-precision sums of the image and clears them.
  void collect_statistics(Workspace& work) {
    double* to = statistics_.data() + statistics_.size() - 3 * problem_.classes;
    for (int64_t i = 0; i < 3 * problem_.classes; ++i) {
      const f32x16 lanes = simd::load(work.intersection + i * kLanes);
      to[i] += simd::reduce_add(simd::convert<simd::f64x16>(lanes));
      simd::store(work.intersection + i * kLanes, f32x16{});
    }
  }

  // Computes `count` output rows from y on, all in the current cell.
  void band(Workspace& work, int64_t y, int count) {
    const int width = static_cast<int>(problem_.width()), stride = static_cast<int>(problem_.label_stride());
    for (int row = 0; row < count; ++row) {
      int32_t* labels = work.labels.get() + row * stride;
      const int64_t first = (image_ * problem_.height() + y + row) * width;
      labels_in_range_ &= load_labels(problem_.labels, first, width, stride, labels);
      if (problem_.task != Task::kStatisticsGradient) count_labels(labels, first);
    }
    for (const Block& block : problem_.plan.blocks) {
      if (wants_gradient(problem_.task)) std::fill_n(work.accumulators.get(), 4 * kLanes * problem_.classes, 0.0f);
      f32x16 loss{};
      for (int row = 0; row < count; ++row) loss += block_row(work, block, y, row);
      numerator_ += simd::reduce_add(simd::convert<simd::f64x16>(loss));
      if (wants_gradient(problem_.task)) add_block_gradient(work, block);
    }
    if (problem_.task == Task::kStatistics) collect_statistics(work);
  }

  // The denominator of the mean.
  void count_labels(const int32_t* labels, int64_t first) {
    const int width = static_cast<int>(problem_.width());
    if (problem_.class_weight || problem_.pixel_weight) {
      for (int x = 0; x < width; ++x) {
        if (labels[x] < 0) continue;
        const double weight = problem_.class_weight ? problem_.class_weight[labels[x]] : 1.0;
        denominator_ += weight * (problem_.pixel_weight ? problem_.pixel_weight[first + x] : 1.0f);
      }
    } else {
      int valid = 0;
      for (int x = 0; x < width; ++x) valid += labels[x] >= 0;
      denominator_ += valid;
    }
  }

  // Computes a block in output row y + row, row `row` of the band.
  f32x16 block_row(Workspace& work, const Block& block, int64_t y, int row) {
    const int32_t* labels = work.labels.get() + row * problem_.label_stride();
    switch (problem_.task) {
      case Task::kLoss: return with_steps<Task::kLoss>(work, block, labels, y + row);
      case Task::kGradient: return with_steps<Task::kGradient>(work, block, labels, y + row);
      case Task::kStatistics: return with_steps<Task::kStatistics>(work, block, labels, y + row);
      default: return with_steps<Task::kStatisticsGradient>(work, block, labels, y + row);
    }
  }

  template <Task task>
  f32x16 with_steps(Workspace& work, const Block& block, const int32_t* labels, int64_t y) {
    return dispatch_steps<kMostSteps>(block.steps, [&](auto steps) {
      load_tile<steps>(problem_, block, image_, y, labels, work.tile);
      if (work.tile.classes.empty()) {
        if (problem_.losses) zero_losses(block, y);
        return f32x16{};
      }
      BlockRow<steps, task> row(problem_, work, block, image_, y);
      row.run();
      return row.loss();
    });
  }

  // Calls run(integral constant of `steps`).
  template <int most, typename Run>
  f32x16 dispatch_steps(int steps, const Run& run) {
    if constexpr (most > 1) {
      if (steps < most) return dispatch_steps<most - 1>(steps, run);
    }
    return run(std::integral_constant<int, most>());
  }

  void zero_losses(const Block& block, int64_t y) {
    float* to = problem_.losses + (image_ * problem_.height() + y) * problem_.width();
    for (int k = 0; k < block.steps; ++k) {
      for (int32_t pixel : block.pixel[k]) {
        if (pixel < problem_.width()) to[pixel] = 0.0f;
      }
    }
  }

  // Adds the gradients of the corners of the block's cells to the two source rows.
  void add_block_gradient(Workspace& work, const Block& block) {
    for (int end = 0; end < 2; ++end) {  // the outer loop: the two ends of a class overlap
      for (int64_t c = 0; c < problem_.classes; ++c) {
        const float* sums = work.accumulators.get() + (c * 4 + end) * kLanes;
        const f32x16 total = simd::load(sums), lower = simd::load(sums + 2 * kLanes);
        float* to_upper = work.gradient_upper + c * work.stride + block.cell + end;
        float* to_lower = work.gradient_lower + c * work.stride + block.cell + end;
        simd::store(to_upper, simd::load(to_upper) + (total - lower));
        simd::store(to_lower, simd::load(to_lower) + lower);
      }
    }
  }

  const Problem& problem_;
  int64_t first_row_, last_row_;  // of the N * H output rows
  int64_t image_ = -1, cell_ = -1;
  GradientRows gradient_;
  double numerator_ = 0, denominator_ = 0;
  std::vector<double> statistics_;  // [images of the slice][3][C]
  int64_t first_image_ = 0;
  bool labels_in_range_ = true;
};

// Moves the begin of a slice from `row` to the first row of its cell, if cells are small.
inline int64_t first_row_of_slice(const Problem& problem, int64_t row, int64_t rows_of_slice) {
  const int64_t image = row / problem.height(), y = row % problem.height();
  if (y == 0 || image == problem.images || problem.vertical.largest_cell() > rows_of_slice / 2) return row;
  return image * problem.height() + problem.vertical.first[problem.vertical.cell[y]];
}

// Runs the problem. Slices are few enough that the rows kept separately stay within the op's memory limit.
inline Totals run(const Problem& problem) {
  const int64_t rows = problem.images * problem.height();
  Totals totals;
  if (problem.task == Task::kStatistics) totals.statistics.assign(problem.images * 3 * problem.classes, 0.0);
  if (rows == 0) return totals;
  const int64_t row_of_classes = problem.classes * problem.source_width();
  const int64_t by_source = problem.images * problem.source_height() / 16;
  const int64_t by_output = rows * problem.width() / (8 * row_of_classes);
  const fastseg::UnevenSlices cut(rows, ceil_divide(rows, std::max<int64_t>({1, by_source, by_output})));
  const int64_t slices = cut.slices();
  std::vector<Slice> parts;
  const auto first_row = [&](int64_t slice) { return first_row_of_slice(problem, cut.begin(slice), rows / slices); };
  for (int64_t slice = 0; slice < slices; ++slice) parts.emplace_back(problem, first_row(slice), first_row(slice + 1));
  fastseg::share_slices(slices, [&](const auto& take) {
    Workspace work(problem);
    for (int64_t slice = take(); slice >= 0; slice = take()) parts[slice].run(work);
  });
  for (const Slice& part : parts) part.add_to(totals);
  return totals;
}

}  // namespace upsample_cross_entropy
