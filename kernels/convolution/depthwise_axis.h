// Geometry, weights and epilogue of the depthwise convolutions on the CPU, for both layouts of the images.
//
// Along one axis both maps have one form. Their outputs fall into phases, o = phase + k output_step, and for output k
// tap t of a phase reads source element t.phase + (k + t.offset) source_step:
//     convolution             one phase of outputs; source_step is the stride
//     transposed convolution  as many phases as the stride, each with the taps that reach it; source_step is 1
// A tap is inside of the source for one range of k, and is visited in that range only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "convolution/epilogue.h"
#include "fastseg/arguments.h"
#include "fastseg/layout.h"
#include "fastseg/parallel.h"
#include "fastseg/pixel_tile.h"
#include "fastseg/simd.h"
#include "fastseg/transpose.h"

namespace fastseg::depthwise {

using convolution::check_image;
using convolution::Epilogue;
using convolution::ImageView;
using convolution::padded;
using simd::kLanes;
using Pair = std::vector<int64_t>;  // of height and width

struct Tap {
  int64_t index;  // in the kernel
  int64_t phase;  // of the source
  int64_t offset;
  int64_t first, end;  // inside of the source for outputs k in [first, end)
};

struct Phase {
  int64_t outputs;        // k in [0, outputs)
  std::vector<Tap> taps;  // in order of the ranges of outputs that they are inside for
};

struct Axis {
  int64_t kernel, source, output;  // extents
  int64_t source_step = 1, output_step = 1;
  std::vector<Phase> phases;  // of the outputs

  static Axis convolution(int64_t kernel, int64_t source, int64_t output, int64_t stride, int64_t padding,
                          int64_t dilation) {
    check(kernel, stride, padding, dilation);
    Axis axis{kernel, source, output, stride, 1, {}};
    Phase all{output, {}};
    for (int64_t index = 0; index < kernel; ++index) {
      const int64_t offset = floor_divide(index * dilation - padding, stride);
      const int64_t phase = index * dilation - padding - offset * stride;
      axis.add(all, index, phase, offset);
    }
    axis.phases.push_back(std::move(all));
    return axis;
  }

  static Axis transposed(int64_t kernel, int64_t source, int64_t output, int64_t stride, int64_t padding,
                         int64_t dilation) {
    check(kernel, stride, padding, dilation);
    Axis axis{kernel, source, output, 1, stride, {}};
    for (int64_t phase = 0; phase < std::min(stride, output); ++phase) {
      Phase own{ceil_divide(output - phase, stride), {}};
      for (int64_t index = 0; index < kernel; ++index) {
        const int64_t distance = phase + padding - index * dilation;
        if (distance % stride == 0) axis.add(own, index, 0, distance / stride);
      }
      axis.phases.push_back(std::move(own));
    }
    return axis;
  }

  // Source elements phase, phase + source_step, ...
  int64_t elements(int64_t phase) const { return source > phase ? ceil_divide(source - phase, source_step) : 0; }

  // Calls body(tap, source element) for the taps of output `o`.
  template <typename Body>
  void for_each_tap(int64_t o, const Body& body) const {
    const int64_t k = output_step == 1 ? o : o / output_step;  // a division takes as long as a short row
    for (const Tap& tap : phases[o - k * output_step].taps) {
      if (tap.first <= k && k < tap.end) body(tap, tap.phase + (k + tap.offset) * source_step);
    }
  }

 private:
  static void check(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    constexpr int64_t kMost = int64_t{1} << 60;  // so that no sum of them overflows
    FASTSEG_CHECK(kernel >= 1 && stride >= 1 && stride <= kMost && padding >= 0 && padding <= kMost && dilation >= 1 &&
                      dilation <= kMost / kernel,
                  "stride, padding or extent of the kernel is out of range");
  }

  // Adds the tap unless it is inside for no output.
  void add(Phase& to, int64_t index, int64_t phase, int64_t offset) const {
    const int64_t first = std::max<int64_t>(0, -offset), end = std::min(to.outputs, elements(phase) - offset);
    if (first < end) to.taps.push_back({index, phase, offset, first, end});
  }
};

// One map of [N, C, rows.source, columns.source] to [N, C, rows.output, columns.output].
struct Map {
  int64_t images, channels;
  Axis rows, columns;
  bool channels_last;

  int64_t taps() const { return rows.kernel * columns.kernel; }
  // The least number of output rows (over all images) that is worth a slice.
  int64_t smallest_slice(int64_t planes_in_row) const {
    constexpr int64_t kWorthwhile = 1 << 15;  // multiplications
    const int64_t taps_met = std::max<int64_t>(1, taps() / (rows.output_step * columns.output_step));
    return ceil_divide(kWorthwhile, std::max<int64_t>(1, columns.output * taps_met * planes_in_row));
  }
};

// True if both images are dense channels_last, false if both are dense NCHW.
inline bool check_formats(const Tensor& input, const Tensor& other, const char* name) {
  if (is_channels_last(input) && is_channels_last(other)) return true;
  FASTSEG_CHECK(input.is_contiguous() && other.is_contiguous(), "input and ", name,
                " must be dense in the same memory format");
  return false;
}

// `count` (1..16) elements `stride` apart, in the first lanes.
template <typename scalar_t>
FASTSEG_INLINE auto load_strided(const scalar_t* from, int64_t stride, int count) {
  if (stride == 1 && count == kLanes) return simd::load(from);
  alignas(64) scalar_t buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = from[std::min(i, count - 1) * stride];
  return simd::load(buffer);
}

template <typename scalar_t, typename vector_t>
FASTSEG_INLINE void store_first(scalar_t* to, vector_t lanes, int count) {
  if (count == kLanes) {
    simd::store(to, lanes);
  } else {
    simd::store_partial(to, lanes, count);
  }
}

// weight [C, 1, R, S] of any strides as [C][R S] or, with `by_tap`, as [R S][padded(C)].
template <typename scalar_t>
std::vector<simd::accumulate<scalar_t>> gathered_weights(const Tensor& weight, const Map& map, bool by_tap) {
  FASTSEG_CHECK(weight.is_cpu() && weight.scalar_type() == scalar_type_of<scalar_t>() && weight.dim() == 4 &&
                    weight.size(0) == map.channels && weight.size(1) == 1 && weight.size(2) == map.rows.kernel &&
                    weight.size(3) == map.columns.kernel,
                "weight must be a CPU tensor [C, 1, R, S] of the dtype of input");
  const int64_t row_taps = map.columns.kernel, taps = map.taps();
  const int64_t tap_stride = by_tap ? padded(map.channels) : 1, channel_stride = by_tap ? 1 : taps;
  std::vector<simd::accumulate<scalar_t>> gathered(by_tap ? taps * tap_stride : taps * map.channels);
  const ImageView<scalar_t> values(weight);
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const scalar_t* value = values.at(c, 0, tap / row_taps, tap % row_taps);
      gathered[c * channel_stride + tap * tap_stride] = static_cast<simd::accumulate<scalar_t>>(*value);
    }
  }
  return gathered;
}

// Writes sums[c * channel_stride + tap * tap_stride] to grad_weight [C, 1, R, S] of any strides.
template <typename scalar_t>
void write_grad_weight(const double* sums, int64_t channel_stride, int64_t tap_stride, const Map& map,
                       const Tensor& grad_weight) {
  scalar_t* values = grad_weight.mutable_data_ptr<scalar_t>();
  const auto strides = grad_weight.strides();
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t r = 0; r < map.rows.kernel; ++r) {
      for (int64_t s = 0; s < map.columns.kernel; ++s) {
        const double sum = sums[c * channel_stride + (r * map.columns.kernel + s) * tap_stride];
        values[c * strides[0] + r * strides[2] + s * strides[3]] =
            static_cast<scalar_t>(static_cast<simd::accumulate<scalar_t>>(sum));
      }
    }
  }
}

struct ColumnTap {
  int64_t at;  // for output k it reads element at + k of a source row
  int64_t index, first, end;
};

// Neighbouring vectors of outputs with the same taps. `masked`: one vector, in which some taps are inside for some
// lanes only.
struct Block {
  int64_t first, vectors;
  int begin, end;  // taps of the phase
  bool masked;
  int low, high;  // the lanes that count
};

// The columns axis, cut into blocks.
struct Columns {
  struct PhaseBlocks {
    std::vector<ColumnTap> taps;
    std::vector<Block> blocks;
  };

  const Axis& axis;
  std::vector<int64_t> source_phases;  // those that a tap reads
  int64_t segment;                     // elements from one phase to the next in a split row, with 16 more at both ends
  std::vector<PhaseBlocks> phases;     // of the outputs

  // each_once: every output counts in one block only. Else the last vector of a row may repeat some of the one before.
  Columns(const Axis& axis, bool each_once, int64_t longest_run) : axis(axis) {
    for (const Phase& phase : axis.phases) {
      for (const Tap& tap : phase.taps) source_phases.push_back(tap.phase);
    }
    if (source_phases.empty()) source_phases.push_back(0);  // SourceRows needs one even if no tap reads it
    std::sort(source_phases.begin(), source_phases.end());
    source_phases.erase(std::unique(source_phases.begin(), source_phases.end()), source_phases.end());
    segment = axis.elements(0) + 2 * kLanes;
    for (const Phase& phase : axis.phases) {
      PhaseBlocks own;
      for (const Tap& tap : phase.taps) {
        const auto found = std::lower_bound(source_phases.begin(), source_phases.end(), tap.phase);
        own.taps.push_back({(found - source_phases.begin()) * segment + tap.offset, tap.index, tap.first, tap.end});
      }
      for (int64_t k = 0; k < phase.outputs; k += kLanes) add_vector(own, k, phase.outputs, each_once, longest_run);
      phases.push_back(std::move(own));
    }
  }

 private:
  static void add_vector(PhaseBlocks& to, int64_t k, int64_t outputs, bool each_once, int64_t longest_run) {
    Block block{std::max<int64_t>(0, std::min(k, outputs - kLanes)), 1, 0, 0, false, 0, kLanes};
    block.high = static_cast<int>(std::min<int64_t>(kLanes, outputs));
    if (each_once) block.low = static_cast<int>(k - block.first);
    const int64_t low = block.first + block.low, high = block.first + block.high;
    const auto meets = [&](const ColumnTap& tap) { return tap.first < high && low < tap.end; };
    const int taps = static_cast<int>(to.taps.size());
    while (block.begin < taps && !meets(to.taps[block.begin])) ++block.begin;
    for (block.end = block.begin; block.end < taps && meets(to.taps[block.end]); ++block.end) {
      const ColumnTap& tap = to.taps[block.end];
      block.masked = block.masked || tap.first > low || tap.end < high;
    }
    block.masked = block.masked || (each_once && high - low < kLanes);
    if (!to.blocks.empty() && !block.masked) {
      Block& last = to.blocks.back();
      if (!last.masked && last.vectors < longest_run && last.first + last.vectors * kLanes == block.first &&
          last.begin == block.begin && last.end == block.end) {
        ++last.vectors;
        return;
      }
    }
    to.blocks.push_back(block);
  }
};

// Rows of a source [planes, H, W] from which 16 elements can be loaded wherever one of them is needed: rows in place,
// or split into phases, or copied where such loads would leave the tensor.
template <typename scalar_t>
class SourceRows {
 public:
  SourceRows(const scalar_t* data, int64_t planes, const Axis& rows, const Columns& columns)
      : data_(data), elements_(planes * rows.source * columns.axis.source), height_(rows.source),
        width_(columns.axis.source), columns_(columns), slots_(slots_of(rows)), by_tap_(slots_ > kMostSlots) {
    if (by_tap_) slots_ = rows.kernel;
    held_.assign(slots_, -1);
  }

  // The row that tap `tap` of an output row needs. Valid until a row for another output row is requested.
  const scalar_t* row(int64_t plane, int64_t y, int64_t tap) {
    const int64_t number = plane * height_ + y, offset = number * width_;
    const bool splits = columns_.axis.source_step > 1;
    if (!splits && offset >= kLanes && offset + width_ + kLanes <= elements_) return data_ + offset;
    const int64_t slot = by_tap_ ? tap : y % slots_;
    const int64_t room = static_cast<int64_t>(columns_.source_phases.size()) * columns_.segment;
    if (!copies_) copies_.emplace(slots_ * room);
    scalar_t* copy = copies_->get() + slot * room;
    if (held_[slot] != number) {
      if (held_[slot] < 0) std::fill_n(copy, room, scalar_t(0));  // also around the phases: loads reach there
      held_[slot] = number;
      split(data_ + offset, copy + kLanes);
    }
    return copy + kLanes;
  }

 private:
  static constexpr int64_t kMostSlots = 64;

  // The number of source rows from the first to the last that an output row needs.
  static int64_t slots_of(const Axis& rows) {
    int64_t most = 1;
    for (const Phase& phase : rows.phases) {
      if (phase.taps.empty()) continue;
      int64_t lowest = INT64_MAX, highest = INT64_MIN;
      for (const Tap& tap : phase.taps) {
        const int64_t place = tap.offset * rows.source_step + tap.phase;
        lowest = std::min(lowest, place), highest = std::max(highest, place);
      }
      most = std::max(most, highest - lowest + 1);
    }
    return std::min(most, rows.source);
  }

  void split(const scalar_t* from, scalar_t* to) const {
    const int64_t step = columns_.axis.source_step, segment = columns_.segment;
    const int64_t phases = columns_.source_phases.size();
    int64_t done = 0;  // elements of every phase
    if (step == 1) {
      std::copy_n(from, width_, to);
      return;
    }
    if (step == 2 && phases == 2) {
      for (; 2 * (done + kLanes) <= width_; done += kLanes) {
        const auto low = simd::load(from + 2 * done), high = simd::load(from + 2 * done + kLanes);
        simd::store(to + done, simd::every_second<0>(low, high));
        simd::store(to + segment + done, simd::every_second<1>(low, high));
      }
    } else if (step == phases) {
      done = width_ / step;
      detail::transpose(from, step, to, segment, done, step);
    }
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t first = columns_.source_phases[phase];
      for (int64_t k = done; k < columns_.axis.elements(first); ++k) to[phase * segment + k] = from[first + k * step];
    }
  }

  const scalar_t* data_;
  int64_t elements_, height_, width_;
  const Columns& columns_;
  int64_t slots_;
  bool by_tap_;                              // whether slots are numbered by tap; else row y takes slot y % slots_
  std::vector<int64_t> held_;                // [slots], number of the row in it, -1 for none
  std::optional<Scratch<scalar_t>> copies_;  // [slots][source phases][segment]
};

}  // namespace fastseg::depthwise
