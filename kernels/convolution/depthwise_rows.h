// Depthwise convolutions of NCHW images: lanes are 16 outputs k of one phase along a row.
//
// A stride is taken out of the inner loop. Rows of a strided source are split into their phases, each dense, when they
// are first needed; the phases of a transposed convolution's output row are put together when all are there.
#pragma once

#include <type_traits>

#include "convolution/depthwise_axis.h"
#include "fastseg/pixel_tile.h"
#include "fastseg/transpose.h"

namespace fastseg::depthwise {

constexpr int kRun = simd::kRegisterBytes >= 32 ? 4 : 2;  // vectors whose sums stay in registers

struct ColumnTap {
  int64_t at;  // what it reads for output k is element at + k of a source row
  int64_t index, first, end;
};

// Neighbouring vectors of outputs that see the same taps. `masked`: one vector, some of whose lanes miss some of them.
struct Block {
  int64_t first, vectors;
  int begin, end;  // taps of the phase
  bool masked;
  int low, high;   // the lanes that count
};

// The columns axis, cut into blocks.
struct Columns {
  struct PhaseBlocks {
    std::vector<ColumnTap> taps;
    std::vector<Block> blocks;
  };

  const Axis& axis;
  std::vector<int64_t> source_phases;  // those that are read
  int64_t segment;                     // elements between two of them in a split row, room for 16 at either end
  std::vector<PhaseBlocks> phases;     // of the outputs

  // each_once: every output counts in one block only. Else the last vector of a row may repeat some of the one before.
  Columns(const Axis& axis, bool each_once, int64_t longest_run) : axis(axis) {
    for (const Phase& phase : axis.phases) {
      for (const Tap& tap : phase.taps) source_phases.push_back(tap.phase);
    }
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

// Rows of a source [planes, H, W], 16 elements of which may be read from anywhere a lane of theirs is needed: where they
// lie, or split into phases, or copied where there is no memory beside them.
template <typename scalar_t>
class SourceRows {
 public:
  SourceRows(const scalar_t* data, int64_t planes, const Axis& rows, const Columns& columns)
      : data_(data), elements_(planes * rows.source * columns.axis.source), height_(rows.source),
        width_(columns.axis.source), columns_(columns), slots_(slots_of(rows)), by_tap_(slots_ > kMostSlots) {
    if (by_tap_) slots_ = rows.kernel;
    held_.assign(slots_, -1);
  }

  // The row that tap `tap` of an output row needs. Valid until another output row is asked for.
  const scalar_t* row(int64_t plane, int64_t y, int64_t tap) {
    const int64_t number = plane * height_ + y, offset = number * width_;
    const bool splits = columns_.axis.source_step > 1;
    if (!splits && offset >= kLanes && offset + width_ + kLanes <= elements_) return data_ + offset;
    const int64_t slot = by_tap_ ? tap : y % slots_;
    const int64_t room = static_cast<int64_t>(columns_.source_phases.size()) * columns_.segment;
    if (!copies_) copies_.emplace(slots_ * room);
    scalar_t* copy = copies_->get() + slot * room;
    if (held_[slot] != number) {
      if (held_[slot] < 0) std::fill_n(copy, room, scalar_t(0));  // around the phases, too: no odd numbers there
      held_[slot] = number;
      split(data_ + offset, copy + kLanes);
    }
    return copy + kLanes;
  }

 private:
  static constexpr int64_t kMostSlots = 64;

  // As many as an output row needs and the rows between.
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
  bool by_tap_;                              // a slot for every tap, else for every row of as many in turn
  std::vector<int64_t> held_;                // [slots], number of the row, -1 for none
  std::optional<Scratch<scalar_t>> copies_;  // [slots][source phases][segment]
};

// A row of the source and what it is multiplied with, [S].
template <typename scalar_t>
struct RowTap {
  const scalar_t* data;
  const simd::accumulate<scalar_t>* weights;
};

template <typename accumulate_t>
FASTSEG_INLINE simd::mask<accumulate_t> lanes_inside(const Block& block, const ColumnTap& tap) {
  using mask_t = simd::mask<accumulate_t>;
  using lane_t = simd::lane_of<mask_t>;
  const mask_t lane = simd::convert<mask_t>(simd::lane_index());
  const lane_t low = std::max<int64_t>(block.low, tap.first - block.first);
  const lane_t high = std::min<int64_t>(block.high, tap.end - block.first);
  return (lane >= low) & (lane < high);
}

// body(first output, sums) for every vector of a phase, from the `count` source rows that its row meets.
template <typename scalar_t, typename Body>
FASTSEG_INLINE void sum_phase(const Columns::PhaseBlocks& phase, const RowTap<scalar_t>* rows, int64_t count,
                              const Body& body) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  const ColumnTap* taps = phase.taps.data();
  const auto run = [&](const Block& block, auto vectors) FASTSEG_ALWAYS_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    vector_t sums[kVectors];
    FASTSEG_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[v] = vector_t{};
    for (int64_t r = 0; r < count; ++r) {
      for (int t = block.begin; t < block.end; ++t) {
        const scalar_t* from = rows[r].data + taps[t].at + block.first;
        const accumulate_t weight = rows[r].weights[taps[t].index];
        FASTSEG_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[v] += simd::load(from + v * kLanes) * weight;
      }
    }
    FASTSEG_UNROLL
    for (int v = 0; v < kVectors; ++v) body(block.first + v * kLanes, sums[v]);
  };
  for (const Block& block : phase.blocks) {
    if (block.masked) {
      vector_t sum{};
      for (int t = block.begin; t < block.end; ++t) {
        const auto inside = lanes_inside<accumulate_t>(block, taps[t]);
        for (int64_t r = 0; r < count; ++r) {
          const vector_t values = simd::load(rows[r].data + taps[t].at + block.first);
          sum = simd::select(inside, sum + values * rows[r].weights[taps[t].index], sum);
        }
      }
      body(block.first, sum);
    } else if (block.vectors == 1) {
      run(block, std::integral_constant<int, 1>());
    } else if (block.vectors == 2) {
      run(block, std::integral_constant<int, 2>());
    } else if constexpr (kRun == 4) {
      if (block.vectors == 3) {
        run(block, std::integral_constant<int, 3>());
      } else {
        run(block, std::integral_constant<int, 4>());
      }
    }
  }
}

// Epilogue and stores of one output row.
template <typename scalar_t>
struct RowEnd {
  const Epilogue<scalar_t>& epilogue;
  simd::accumulate<scalar_t> bias;
  const scalar_t* residual;
  int64_t residual_step;
  scalar_t* to;  // [OW]
  int count;     // of the lanes of a vector that are outputs
  bool streamed;

  RowEnd(const Epilogue<scalar_t>& epilogue, const Map& map, int64_t plane, int64_t y, scalar_t* output, bool streamed)
      : epilogue(epilogue), bias(epilogue.bias_of(plane % map.channels)), residual(nullptr),
        residual_step(epilogue.residual.column), to(output + (plane * map.rows.output + y) * map.columns.output),
        count(static_cast<int>(std::min<int64_t>(kLanes, map.columns.output))), streamed(streamed) {
    if (epilogue.residual.data) {
      residual = epilogue.residual.at(plane / map.channels, plane % map.channels, y, 0);
    }
  }

  template <typename vector_t>
  FASTSEG_INLINE void operator()(int64_t x, vector_t sums) const {
    sums += bias;
    if (residual) sums += load_strided(residual + x * residual_step, residual_step, count);
    sums = epilogue.rectified(sums);
    if (streamed && (reinterpret_cast<uintptr_t>(to + x) & kAlignment) == 0) {
      simd::stream(to + x, sums);
    } else {
      store_first(to + x, sums, count);
    }
  }

 private:
  static constexpr uintptr_t kAlignment = std::min<size_t>(64, sizeof(scalar_t) * kLanes) - 1;
};

// The phases of an output row, and the row.
template <typename accumulate_t>
class PhaseRows {
 public:
  explicit PhaseRows(const Axis& axis)
      : phases_(axis.phases.size()), step_(axis.output_step),
        outputs_(axis.phases[0].outputs), segment_(padded(outputs_)), parts_(phases_ * segment_),
        row_(padded(phases_ * segment_)) {}

  accumulate_t* part(int64_t phase) { return parts_.get() + phase * segment_; }

  const accumulate_t* together() {
    if (phases_ == 2) {
      for (int64_t k = 0; k < outputs_; k += kLanes) {
        const auto even = simd::load(part(0) + k), odd = simd::load(part(1) + k);
        simd::store(row_.get() + 2 * k, simd::interleave_low(even, odd));
        simd::store(row_.get() + 2 * k + kLanes, simd::interleave_high(even, odd));
      }
    } else {
      detail::transpose(parts_.get(), segment_, row_.get(), phases_, phases_, outputs_);
    }
    return row_.get();
  }

 private:
  int64_t phases_, step_, outputs_, segment_;
  Scratch<accumulate_t> parts_;  // [phases][segment]
  Scratch<accumulate_t> row_;
};

template <typename scalar_t>
void map_rows(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
              const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  using accumulate_t = simd::accumulate<scalar_t>;
  constexpr int64_t kStreamedBytes = int64_t{1} << 23;
  const Columns columns(map.columns, /*each_once=*/false, kRun);
  const int64_t planes = map.images * map.channels, height = map.rows.output, width = map.columns.output;
  const int64_t bytes = planes * height * width * static_cast<int64_t>(sizeof(scalar_t));
  const bool streamed = width >= kLanes && bytes >= kStreamedBytes;
  const UnevenSlices slices(planes * height, map.smallest_slice(1));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    SourceRows<scalar_t> source(input, planes, map.rows, columns);
    std::vector<RowTap<scalar_t>> met(map.rows.kernel);
    std::optional<PhaseRows<accumulate_t>> parts;
    if (map.columns.output_step > 1) parts.emplace(map.columns);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / height, y = row % height;
      const accumulate_t* own_weights = weights.data() + plane % map.channels * map.taps();
      int64_t count = 0;
      map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
        met[count++] = {source.row(plane, source_y, tap.index), own_weights + tap.index * map.columns.kernel};
      });
      const RowEnd<scalar_t> finish(epilogue, map, plane, y, output, streamed);
      if (!parts) {
        sum_phase(columns.phases[0], met.data(), count, finish);
        continue;
      }
      for (size_t phase = 0; phase < columns.phases.size(); ++phase) {
        accumulate_t* part = parts->part(phase);
        sum_phase(columns.phases[phase], met.data(), count,
                  [&](int64_t k, auto sums) FASTSEG_ALWAYS_INLINE { simd::store(part + k, sums); });
      }
      const accumulate_t* together = parts->together();
      for (int64_t x = 0; x < width; x += kLanes) {
        const int64_t first = std::max<int64_t>(0, std::min(x, width - kLanes));
        finish(first, simd::load(together + first));
      }
    }
    simd::stream_fence();
  });
}

// sums[i] += the products of 16 `vectors` elements of both, lane by lane; from[i] are rows of the source.
template <int taps, typename scalar_t, typename vector_t>
FASTSEG_INLINE void add_products(const scalar_t* grad, const scalar_t* const* from, int64_t vectors, vector_t* sums) {
  vector_t part[taps];
  FASTSEG_UNROLL
  for (int i = 0; i < taps; ++i) part[i] = vector_t{};
  for (int64_t v = 0; v < vectors; ++v) {
    const vector_t values = simd::load(grad + v * kLanes);
    FASTSEG_UNROLL
    for (int i = 0; i < taps; ++i) part[i] += values * simd::load(from[i] + v * kLanes);
  }
  FASTSEG_UNROLL
  for (int i = 0; i < taps; ++i) sums[i] += part[i];
}

// One row of the gradient times the source rows that it meets: sums [R][S] of lanes. Whole runs are summed before they
// are added, so that sums over many pixels are sums of sums.
template <typename scalar_t, typename vector_t>
void add_row_products(const Columns::PhaseBlocks& phase, const scalar_t* grad, const RowTap<scalar_t>* rows,
                      vector_t* const* sums, int64_t count) {
  constexpr int kMost = simd::kRegisterBytes == 64 ? 6 : 3;
  const ColumnTap* taps = phase.taps.data();
  for (const Block& block : phase.blocks) {
    if (block.masked) {
      const vector_t values = simd::load(grad + block.first);
      for (int t = block.begin; t < block.end; ++t) {
        const auto inside = lanes_inside<simd::accumulate<scalar_t>>(block, taps[t]);
        for (int64_t r = 0; r < count; ++r) {
          vector_t& sum = sums[r][taps[t].index];
          sum = simd::select(inside, sum + values * simd::load(rows[r].data + taps[t].at + block.first), sum);
        }
      }
      continue;
    }
    for (int64_t r = 0; r < count; ++r) {
      const scalar_t* from[kMost];
      for (int t = block.begin; t < block.end;) {
        const int together = std::min(kMost, block.end - t);
        for (int i = 0; i < together; ++i) from[i] = rows[r].data + taps[t + i].at + block.first;
        vector_t* to = sums[r] + taps[t].index;  // neighbours here are neighbours in the kernel
        const auto add = [&](auto number) FASTSEG_ALWAYS_INLINE {
          add_products<decltype(number)::value>(grad + block.first, from, block.vectors, to);
        };
        if constexpr (kMost == 6) {
          if (together == 6) add(std::integral_constant<int, 6>());
          if (together == 5) add(std::integral_constant<int, 5>());
          if (together == 4) add(std::integral_constant<int, 4>());
        }
        if (together == 3) add(std::integral_constant<int, 3>());
        if (together == 2) add(std::integral_constant<int, 2>());
        if (together == 1) add(std::integral_constant<int, 1>());
        t += together;
      }
    }
  }
}

// [C][R S] sums of the products of input and grad_output [N, C, OH, OW] that a tap brings together.
template <typename scalar_t>
std::vector<double> sum_weights_of_rows(const Map& map, const scalar_t* input, const scalar_t* grad_output) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  const Columns columns(map.columns, /*each_once=*/true, INT64_MAX);
  const int64_t height = map.rows.output, width = map.columns.output, taps = map.taps();
  const int64_t planes = map.images * map.channels, rows = map.images * height;
  // Each channel's rows are cut into parts where there are few channels.
  const int64_t slice = map.smallest_slice(1), items = 4 * slice_count(planes * height, slice);
  const int64_t parts = std::max<int64_t>(1, std::min(rows, ceil_divide(items, map.channels)));
  std::vector<double> sums(map.channels * parts * taps);
  const UnevenSlices slices(map.channels * parts, ceil_divide(slice * parts, std::max<int64_t>(1, rows)));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    SourceRows<scalar_t> source(input, planes, map.rows, columns);
    std::vector<RowTap<scalar_t>> met(map.rows.kernel);
    std::vector<vector_t*> met_sums(map.rows.kernel);
    const Scratch<vector_t> lanes(taps);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item / parts, part = item % parts;
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      double* own = sums.data() + item * taps;
      std::fill_n(lanes.get(), taps, vector_t{});
      for (int64_t row = first; row < last; ++row) {
        const int64_t plane = row / height * map.channels + channel, y = row % height;
        int64_t count = 0;
        map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
          met[count] = {source.row(plane, source_y, tap.index), nullptr};
          met_sums[count++] = lanes.get() + tap.index * map.columns.kernel;
        });
        const int64_t offset = (plane * height + y) * width;
        const scalar_t* grad = grad_output + offset;
        scalar_t copy[kLanes] = {};
        if (offset + kLanes > planes * height * width) grad = std::copy_n(grad, width, copy) - width;
        add_row_products(columns.phases[0], grad, met.data(), met_sums.data(), count);
        if (y == height - 1 || row == last - 1) {  // in fp32 over one plane, in fp64 over all of them
          for (int64_t tap = 0; tap < taps; ++tap) own[tap] += simd::reduce_add(lanes.get()[tap]);
          std::fill_n(lanes.get(), taps, vector_t{});
        }
      }
    }
  });
  for (int64_t channel = 0; channel < map.channels; ++channel) {
    for (int64_t part = 0; part < parts; ++part) {
      const double* from = sums.data() + (channel * parts + part) * taps;
      double* to = sums.data() + channel * taps;
      for (int64_t tap = 0; tap < taps; ++tap) to[tap] = part == 0 ? from[tap] : to[tap] + from[tap];
    }
  }
  return sums;
}

}  // namespace fastseg::depthwise
