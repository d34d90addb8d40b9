// Walks the output rows: one thread takes consecutive rows, band by band, a band being up to eight rows of one vertical
// cell, block by block.
#pragma once

#include "block_row.h"
#include "rows.h"

namespace upsample_cross_entropy {

struct Totals {
  double numerator = 0, denominator = 0;
  std::vector<double> statistics;  // [N][3][C]: intersection, prediction, truth
  bool labels_in_range = true;
};

class Slice {
 public:
  Slice(const Problem& problem, int64_t first_row, int64_t last_row)
      : problem_(problem), first_row_(first_row), last_row_(last_row) {}

  void run() {
    Workspace work(problem_);
    const int64_t height = problem_.height();
    if (wants_gradient(problem_.task)) {
      const auto& cell = problem_.vertical.cell;
      const int64_t last = last_row_ - 1;
      gradient_.open(problem_, first_row_ / height, cell[first_row_ % height], last / height, cell[last % height]);
    }
    int64_t row = first_row_;
    while (row < last_row_) {
      const int64_t image = row / height, y = row % height, cell = problem_.vertical.cell[y];
      const int64_t end_of_cell = image * height + problem_.vertical.first[cell + 1];
      const int64_t count = std::min({static_cast<int64_t>(kBandRows), end_of_cell - row, last_row_ - row});
      if (image != image_ || cell != cell_) move_to(work, image, cell);
      band(work, y, static_cast<int>(count));
      row += count;
    }
    leave(work, false);
    leave_image(work);
    numerator_ = work.numerator;
    denominator_ = work.denominator;
  }

  void add_to(Totals& totals) const {
    totals.numerator += numerator_;
    totals.denominator += denominator_;
    totals.labels_in_range &= labels_in_range_;
    for (size_t i = 0; i < statistics_.size(); ++i) totals.statistics[statistics_offset_ + i] += statistics_[i];
    if (wants_gradient(problem_.task)) gradient_.add_kept(problem_);
  }

 private:
  void move_to(Workspace& work, int64_t image, int64_t cell) {
    const bool adjacent = image == image_ && cell == cell_ + 1;
    leave(work, adjacent);
    if (image != image_) leave_image(work);
    if (image != image_ && problem_.task == Task::kStatistics) enter_image(work, image);
    read_rows(problem_, work, image, cell, adjacent);
    image_ = image;
    cell_ = cell;
  }

  // Sends out the gradients of the current cell's rows; the lower row is the upper one of an adjacent next cell.
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
    if (statistics_.empty()) statistics_offset_ = image * 3 * problem_.classes;
    std::fill_n(work.intersection, 2 * kLanes * problem_.classes, 0.0f);
    work.truth.assign(problem_.classes, 0.0);
    statistics_.resize(statistics_.size() + 3 * problem_.classes, 0.0);
  }

  void leave_image(Workspace& work) {
    if (image_ < 0 || problem_.task != Task::kStatistics) return;
    collect_statistics(work);
    double* to = statistics_.data() + statistics_.size() - problem_.classes;
    std::copy(work.truth.begin(), work.truth.end(), to);
  }

  // Moves the single-precision sums of the lanes to the double-precision ones of the image.
  void collect_statistics(Workspace& work) {
    double* to = statistics_.data() + statistics_.size() - 3 * problem_.classes;
    for (int64_t i = 0; i < 2 * problem_.classes; ++i) {
      const f32x16 lanes = simd::load(work.intersection + i * kLanes);
      to[i] += simd::reduce_add(simd::convert<simd::f64x16>(lanes));
      simd::store(work.intersection + i * kLanes, f32x16{});
    }
  }

  // `count` output rows from y on, all in the current cell.
  void band(Workspace& work, int64_t y, int count) {
    const int64_t width = problem_.width();
    for (int row = 0; row < count; ++row) {
      int32_t* labels = work.labels.get() + row * (width + 1);
      const int64_t first = (image_ * problem_.height() + y + row) * width;
      labels_in_range_ &=
          load_labels(problem_.labels, first, static_cast<int>(width), static_cast<int>(width) + 1, labels);
      count_labels(work, labels, first);
    }
    for (const Block& block : problem_.plan.blocks) {
      if (wants_gradient(problem_.task)) std::fill_n(work.accumulators.get(), 4 * kLanes * problem_.classes, 0.0f);
      f32x16 loss{};
      for (int row = 0; row < count; ++row) loss += block_row(work, block, y, row);
      work.numerator += simd::reduce_add(simd::convert<simd::f64x16>(loss));
      if (wants_gradient(problem_.task)) add_block_gradient(work, block);
    }
    if (problem_.task == Task::kStatistics) collect_statistics(work);
  }

  // The denominator of the mean, and the true pixels of each class.
  void count_labels(Workspace& work, const int32_t* labels, int64_t first) {
    const int64_t width = problem_.width();
    if (problem_.class_weight || problem_.pixel_weight) {
      for (int64_t x = 0; x < width; ++x) {
        if (labels[x] < 0) continue;
        const double weight = problem_.class_weight ? problem_.class_weight[labels[x]] : 1.0;
        work.denominator += weight * (problem_.pixel_weight ? problem_.pixel_weight[first + x] : 1.0f);
      }
    } else {
      int64_t valid = 0;
      for (int64_t x = 0; x < width; ++x) valid += labels[x] >= 0;
      work.denominator += static_cast<double>(valid);
    }
    if (problem_.task != Task::kStatistics) return;
    for (int64_t x = 0; x < width; ++x) {
      if (labels[x] >= 0) work.truth[labels[x]] += 1.0;
    }
  }

  f32x16 block_row(Workspace& work, const Block& block, int64_t y, int row) {
    load_tile(work, block, y + row, work.labels.get() + row * (problem_.width() + 1));
    if (!work.tile.counts) {
      if (problem_.losses) zero_losses(block, y + row);
      return f32x16{};
    }
    const float fraction = problem_.vertical.fraction[y + row];
    switch (problem_.task) {
      case Task::kLoss:
        return with_steps<Task::kLoss>(work, block, fraction, y + row);
      case Task::kGradient:
        return with_steps<Task::kGradient>(work, block, fraction, y + row);
      case Task::kStatistics:
        return with_steps<Task::kStatistics>(work, block, fraction, y + row);
      default:
        return with_steps<Task::kStatisticsGradient>(work, block, fraction, y + row);
    }
  }

  template <Task task>
  f32x16 with_steps(Workspace& work, const Block& block, float fraction, int64_t y) {
    const auto run = [&](auto steps) {
      BlockRow<decltype(steps)::value, task> row(problem_, work, block, fraction, image_, y);
      row.run();
      return row.loss();
    };
    return dispatch_steps<kMostSteps>(run);
  }

  // run(integral constant of the plan's steps)
  template <int most, typename Run>
  f32x16 dispatch_steps(const Run& run) {
    if constexpr (most > 1) {
      if (problem_.plan.steps < most) return dispatch_steps<most - 1>(run);
    }
    return run(fastseg::constant<most>());
  }

  void load_tile(Workspace& work, const Block& block, int64_t y, const int32_t* labels) {
    PixelTile& tile = work.tile;
    const int steps = problem_.plan.steps;
    uint8_t* present = work.present.get() + 1;
    std::fill_n(present - 1, problem_.classes + 1, uint8_t(0));
    i32x16 counted{};
    for (int k = 0; k < steps; ++k) {
      alignas(64) int32_t gathered[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        gathered[lane] = labels[block.pixel[k][lane]];
        present[gathered[lane]] = 1;
      }
      tile.label[k] = simd::load(gathered);
      counted |= tile.label[k] >= 0;
    }
    tile.counts = simd::any(counted);
    if (!tile.counts) return;
    if (problem_.plain()) {
      const f32x16 weight = simd::splat(problem_.grad_numerator);
      for (int k = 0; k < steps; ++k) {
        tile.target[k] = tile.through[k] = simd::keep_where(tile.label[k] >= 0, weight);
        tile.smooth[k] = f32x16{};
      }
    } else {
      for (int k = 0; k < steps; ++k) load_weights(tile, block, y, k);
    }
  }

  void load_weights(PixelTile& tile, const Block& block, int64_t y, int k) {
    const int64_t row = image_ * problem_.height() + y;
    const float smoothing = problem_.label_smoothing;
    const int64_t* strides = problem_.grad_losses_strides;
    alignas(64) float target_lanes[kLanes]{}, smooth_lanes[kLanes]{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t label = tile.label[k][lane];
      if (label < 0) continue;
      const int64_t x = block.pixel[k][lane];
      float weight = problem_.grad_numerator;
      if (problem_.pixel_weight) weight *= problem_.pixel_weight[row * problem_.width() + x];
      if (problem_.grad_losses) weight *= problem_.grad_losses[image_ * strides[0] + y * strides[1] + x * strides[2]];
      target_lanes[lane] = weight * (1.0f - smoothing) * (problem_.class_weight ? problem_.class_weight[label] : 1.0f);
      smooth_lanes[lane] = weight * smoothing / static_cast<float>(problem_.classes);
    }
    const f32x16 target = simd::load(target_lanes), smooth = simd::load(smooth_lanes);
    tile.target[k] = target;
    tile.smooth[k] = smooth;
    tile.through[k] = target + smooth * problem_.class_weight_sum;
  }

  void zero_losses(const Block& block, int64_t y) {
    float* to = problem_.losses + (image_ * problem_.height() + y) * problem_.width();
    for (int k = 0; k < problem_.plan.steps; ++k) {
      for (int32_t pixel : block.pixel[k]) {
        if (pixel < problem_.width()) to[pixel] = 0.0f;
      }
    }
  }

  // From the corners of the block's cells to the two source rows.
  void add_block_gradient(Workspace& work, const Block& block) {
    for (int64_t c = 0; c < problem_.classes; ++c) {
      const float* corners = work.accumulators.get() + c * 4 * kLanes;
      float* rows[2] = {work.gradient_upper + c * work.stride, work.gradient_lower + c * work.stride};
      for (int corner = 0; corner < 4; ++corner) {
        float* to = rows[corner / 2] + corner % 2;
        const float* from = corners + corner * kLanes;
        if (problem_.plan.consecutive) {
          to += block.cell[0];
          simd::store(to, simd::load(to) + simd::load(from));
        } else {
          for (int lane = 0; lane < kLanes; ++lane) to[block.cell[lane]] += from[lane];
        }
      }
    }
  }

  const Problem& problem_;
  int64_t first_row_, last_row_;  // of the N * H output rows
  int64_t image_ = -1, cell_ = -1;
  GradientRows gradient_;
  double numerator_ = 0, denominator_ = 0;
  std::vector<double> statistics_;  // [images of the slice][3][C]
  int64_t statistics_offset_ = 0;
  bool labels_in_range_ = true;
};

// Runs the problem. Slices are few enough that the rows they keep apart stay within the op's memory limit.
inline Totals run(const Problem& problem) {
  const int64_t rows = problem.images * problem.height();
  Totals totals;
  if (problem.task == Task::kStatistics) totals.statistics.assign(problem.images * 3 * problem.classes, 0.0);
  if (rows == 0) return totals;
  const int64_t row_of_classes = problem.classes * problem.source_width();
  const int64_t by_source = problem.images * problem.source_height() / 8;
  const int64_t by_output = rows * problem.width() / (8 * row_of_classes);
  const int64_t most = std::max<int64_t>({1, by_source, by_output});
  const int64_t slices = std::min(fastseg::slice_count(rows), most);
  std::vector<Slice> parts;
  for (int64_t slice = 0; slice < slices; ++slice) {
    parts.emplace_back(problem, rows * slice / slices, rows * (slice + 1) / slices);
  }
  fastseg::parallel_slices(slices, slices, [&](int64_t slice, int64_t, int64_t) { parts[slice].run(); });
  for (const Slice& part : parts) part.add_to(totals);
  return totals;
}

}  // namespace upsample_cross_entropy
