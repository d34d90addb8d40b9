// Reads source rows (padded, widened to float) and writes their gradients.
#pragma once

#include <utility>

#include "fastseg/elementwise.h"
#include "problem.h"

namespace upsample_cross_entropy {

// Reads row `row` of every class to padded[c * stride + 0 ... w + 1].
template <typename scalar_t>
void read_padded_row(const Problem& problem, int64_t image, int64_t row, float* padded, int64_t stride) {
  const Strides& strides = problem.input_strides;
  const scalar_t* from = static_cast<const scalar_t*>(problem.input) + image * strides.image + row * strides.row;
  const int64_t width = problem.source_width();
  if (strides.column == 1) {
    for (int64_t c = 0; c < problem.classes; ++c) {
      fastseg::detail::convert<scalar_t>(from, c * strides.channel, static_cast<int>(width), padded + c * stride + 1);
    }
  } else {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < problem.classes; ++c) {
        padded[c * stride + 1 + x] = static_cast<float>(from[c * strides.channel + x * strides.column]);
      }
    }
  }
  for (int64_t c = 0; c < problem.classes; ++c) {
    float* line = padded + c * stride;
    // Left of the first column torch takes 1 * column 0 + 0 * column 1: the same number, unless one is infinite or NaN.
    line[0] = line[1] + 0.0f * line[width > 1 ? 2 : 1];
    line[width + 1] = line[width];
  }
}

// Reads the two source rows of vertical cell `cell`; `adjacent`: `work` holds the rows of the cell before it.
inline void read_rows(const Problem& problem, Workspace& work, int64_t image, int64_t cell, bool adjacent) {
  const BilinearAxis& axis = problem.vertical;
  const auto read = [&](int64_t row, float* to) { problem.read_row(problem, image, row, to, work.stride); };
  if (adjacent) {
    std::swap(work.upper, work.lower);
  } else {
    read(axis.left(cell), work.upper);
    if (cell == 0 && axis.source_size > 1) {
      // Above the first row torch takes 1 * row 0 + 0 * row 1: see read_padded_row().
      read(1, work.lower);
      for (int64_t i = 0; i < problem.classes * work.stride; ++i) work.upper[i] += 0.0f * work.lower[i];
    }
  }
  read(axis.right(cell), work.lower);
}

// Collects the gradients of source rows for a slice of the output rows. Rows that the previous slice also writes are
// kept separately and added at the end, slice by slice, so that the result does not depend on the order of threads.
class GradientRows {
 public:
  // The slice starts in vertical cell `cell`, at its first output row, or `inside` of it.
  void open(const Problem& problem, int64_t image, int64_t cell, bool inside) {
    const BilinearAxis& axis = problem.vertical;
    const int64_t first = image * problem.source_height();
    shared_.push_back(first + axis.left(cell));
    if (inside) shared_.push_back(first + axis.right(cell));
    kept_.assign(shared_.size() * row_size(problem), 0.0f);
  }

  // Adds padded[C][stride] to the gradient of a source row.
  void add(const Problem& problem, int64_t image, int64_t row, const float* padded, int64_t stride) {
    const int64_t width = problem.source_width();
    const auto found = std::find(shared_.begin(), shared_.end(), image * problem.source_height() + row);
    float* to = problem.gradient + image * problem.gradient_strides.image + row * problem.gradient_strides.row;
    int64_t channel = problem.gradient_strides.channel, column = problem.gradient_strides.column;
    if (found != shared_.end()) {
      to = kept_.data() + (found - shared_.begin()) * row_size(problem);
      channel = width;
      column = 1;
    }
    for (int64_t c = 0; c < problem.classes; ++c) {
      const float* line = padded + c * stride;
      float* target = to + c * channel;
      if (column == 1) {
        for (int64_t x = 0; x < width; ++x) target[x] += line[x + 1];
      } else {
        for (int64_t x = 0; x < width; ++x) target[x * column] += line[x + 1];
      }
      target[0] += line[0];
      target[(width - 1) * column] += line[width + 1];
    }
  }

  void add_kept(const Problem& problem) const {
    const int64_t width = problem.source_width();
    const Strides& strides = problem.gradient_strides;
    const float* from = kept_.data();
    for (int64_t shared : shared_) {
      const int64_t image = shared / problem.source_height(), row = shared % problem.source_height();
      for (int64_t c = 0; c < problem.classes; ++c) {
        float* to = problem.gradient + image * strides.image + c * strides.channel + row * strides.row;
        for (int64_t x = 0; x < width; ++x) to[x * strides.column] += *from++;
      }
    }
  }

 private:
  static int64_t row_size(const Problem& problem) { return problem.classes * problem.source_width(); }

  std::vector<int64_t> shared_;  // image * h + row
  std::vector<float> kept_;      // [rows of shared_][C][w]
};

}  // namespace upsample_cross_entropy
