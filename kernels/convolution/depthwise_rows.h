// Depthwise convolutions of NCHW images: lanes are 16 outputs k of one phase along a row.
//
// The inner loop has no stride. Rows of a strided source are split into dense phases when they are first needed; the
// phases of a transposed convolution's output row are interleaved when all are computed.
#pragma once

#include <type_traits>

#include "convolution/depthwise_axis.h"

namespace fastseg::depthwise {

constexpr int kRun = simd::kRegisterBytes >= 32 ? 4 : 2;  // vectors whose sums stay in registers

// A row of the source and its weights, [S].
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

// Calls body(first output, sums) for every vector of a phase, with sums over the `count` source rows that its row
// reads.
template <typename scalar_t, typename Body>
FASTSEG_INLINE void sum_phase(const Columns::PhaseBlocks& phase, const RowTap<scalar_t>* rows, int64_t count,
                              const Body& body) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  const ColumnTap* taps = phase.taps.data();
  const auto run = [&](const Block& block, auto vectors) FASTSEG_ALWAYS_INLINE {
    constexpr int kVectors = decltype(vectors)::value, kChains = std::max(1, kRun / 2 / kVectors);
    vector_t sums[kChains][kVectors];  // an addition waits for the one before: with few vectors each has several sums
    FASTSEG_UNROLL
    for (int c = 0; c < kChains; ++c) {
      FASTSEG_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[c][v] = vector_t{};
    }
    const auto add = [&](int64_t r, int t, int c) FASTSEG_ALWAYS_INLINE {
      const scalar_t* from = rows[r].data + taps[t].at + block.first;
      const accumulate_t weight = rows[r].weights[taps[t].index];
      FASTSEG_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[c][v] += simd::load(from + v * kLanes) * weight;
    };
    int64_t r = 0;
    for (; r + kChains <= count; r += kChains) {
      for (int t = block.begin; t < block.end; ++t) {
        FASTSEG_UNROLL
        for (int c = 0; c < kChains; ++c) add(r + c, t, c);
      }
    }
    for (; r < count; ++r) {
      for (int t = block.begin; t < block.end; ++t) add(r, t, 0);
    }
    FASTSEG_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      FASTSEG_UNROLL
      for (int c = 1; c < kChains; ++c) sums[0][v] += sums[c][v];
      body(block.first + v * kLanes, sums[0][v]);
    }
  };
  for (const Block& block : phase.blocks) {
    if (block.masked) {
      vector_t even{}, odd{};
      for (int t = block.begin; t < block.end; ++t) {
        const auto inside = lanes_inside<accumulate_t>(block, taps[t]);
        const auto add = [&](int64_t r, vector_t& sum) FASTSEG_ALWAYS_INLINE {
          const vector_t values = simd::load(rows[r].data + taps[t].at + block.first);
          sum = simd::select(inside, sum + values * rows[r].weights[taps[t].index], sum);
        };
        int64_t r = 0;
        for (; r + 2 <= count; r += 2) {
          add(r, even);
          add(r + 1, odd);
        }
        if (r < count) add(r, even);
      }
      body(block.first, even + odd);
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

// Applies the epilogue to an output row and stores it.
template <typename scalar_t>
struct RowWriter {
  const Epilogue<scalar_t>& epilogue;
  simd::accumulate<scalar_t> bias;
  const scalar_t* residual;
  int64_t residual_step;
  scalar_t* to;  // [OW]
  int count;     // lanes of a vector that are outputs
  int stored;    // lanes that are written; a later row overwrites those past the end of this one
  bool streamed;

  template <typename vector_t>
  FASTSEG_INLINE void operator()(int64_t x, vector_t sums) const {
    sums += bias;
    if (residual) sums += load_strided(residual + x * residual_step, residual_step, count);
    sums = epilogue.rectified(sums);
    if (streamed && (reinterpret_cast<uintptr_t>(to + x) & kAlignment) == 0) {
      simd::stream(to + x, sums);
    } else {
      store_first(to + x, sums, stored);
    }
  }

 private:
  static constexpr uintptr_t kAlignment = std::min<size_t>(64, sizeof(scalar_t) * kLanes) - 1;
};

// The phases of an output row, and the row that they are interleaved to.
template <typename accumulate_t>
class PhaseRows {
 public:
  explicit PhaseRows(const Axis& axis)
      : phases_(axis.phases.size()), step_(axis.output_step), outputs_(axis.phases[0].outputs),
        segment_(padded(outputs_)), parts_(phases_ * segment_), row_(padded(phases_ * segment_)) {}

  accumulate_t* part(int64_t phase) { return parts_.get() + phase * segment_; }

  const accumulate_t* joined() {
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

// Computes rows of a map, on one thread.
template <typename scalar_t>
class RowMap {
 public:
  RowMap(const Map& map, const Columns& columns, const scalar_t* input,
         const std::vector<simd::accumulate<scalar_t>>& weights, const Epilogue<scalar_t>& epilogue, scalar_t* output)
      : map_(map), columns_(columns), weights_(weights), epilogue_(epilogue), output_(output),
        source_(input, map.images * map.channels, map.rows, columns), row_taps_(map.rows.kernel) {
    constexpr int64_t kStreamedBytes = int64_t{1} << 23;
    const int64_t rows = map.images * map.channels * map.rows.output, width = map.columns.output;
    streamed_ = width >= kLanes && rows * width * static_cast<int64_t>(sizeof(scalar_t)) >= kStreamedBytes;
    if (map.columns.output_step > 1) parts_.emplace(map.columns);
  }

  // Rows [begin, end) of the output [N C, OH].
  void run(int64_t begin, int64_t end) {
    const int64_t height = map_.rows.output, width = map_.columns.output;
    int64_t plane = begin / height, y = begin % height;
    for (int64_t row = begin; row < end; ++row) {
      run_row(plane, y, /*spills=*/(end - row) * width >= kLanes);
      if (++y == height) ++plane, y = 0;
    }
    if (streamed_) simd::stream_fence();
  }

 private:
  void run_row(int64_t plane, int64_t y, bool spills) {
    const int64_t channel = plane % map_.channels, row = plane * map_.rows.output + y;
    const auto* weights = weights_.data() + channel * map_.taps();
    int64_t count = 0;
    map_.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
      row_taps_[count++] = {source_.row(plane, source_y, tap.index), weights + tap.index * map_.columns.kernel};
    });
    const ImageView<scalar_t>& residual = epilogue_.residual;
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, map_.columns.output));
    const RowWriter<scalar_t> finish{epilogue_,
                                     epilogue_.bias_of(channel),
                                     residual.data ? residual.at(plane / map_.channels, channel, y, 0) : nullptr,
                                     residual.column,
                                     output_ + row * map_.columns.output,
                                     lanes,
                                     spills ? kLanes : lanes,
                                     streamed_};
    if (!parts_) {
      sum_phase(columns_.phases[0], row_taps_.data(), count, finish);
      return;
    }
    for (size_t phase = 0; phase < columns_.phases.size(); ++phase) {
      auto* part = parts_->part(phase);
      sum_phase(columns_.phases[phase], row_taps_.data(), count,
                [&](int64_t k, auto sums) FASTSEG_ALWAYS_INLINE { simd::store(part + k, sums); });
    }
    const auto* joined = parts_->joined();
    const int64_t width = map_.columns.output;
    for (int64_t x = 0; x < width; x += kLanes) {
      const int64_t first = std::max<int64_t>(0, std::min(x, width - kLanes));
      finish(first, simd::load(joined + first));
    }
  }

  const Map& map_;
  const Columns& columns_;
  const std::vector<simd::accumulate<scalar_t>>& weights_;
  const Epilogue<scalar_t>& epilogue_;
  scalar_t* output_;
  bool streamed_;
  SourceRows<scalar_t> source_;
  std::vector<RowTap<scalar_t>> row_taps_;
  std::optional<PhaseRows<simd::accumulate<scalar_t>>> parts_;
};

template <typename scalar_t>
void map_rows(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
              const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  const Columns columns(map.columns, /*each_once=*/false, kRun);
  const UnevenSlices slices(map.images * map.channels * map.rows.output, map.smallest_slice(1));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    RowMap<scalar_t>(map, columns, input, weights, epilogue, output).run(begin, end);
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

// Adds the products of one row of the gradient and the source rows that it reads to `sums` [R][S], lane by lane. Each
// run is summed before it is added, so that sums over many pixels are sums of sums.
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
        const int number_of_taps = std::min(kMost, block.end - t);
        for (int i = 0; i < number_of_taps; ++i) from[i] = rows[r].data + taps[t + i].at + block.first;
        vector_t* to = sums[r] + taps[t].index;  // taps that follow each other here do so in the kernel
        const auto add = [&](auto number) FASTSEG_ALWAYS_INLINE {
          add_products<decltype(number)::value>(grad + block.first, from, block.vectors, to);
        };
        if constexpr (kMost == 6) {
          if (number_of_taps == 6) add(std::integral_constant<int, 6>());
          if (number_of_taps == 5) add(std::integral_constant<int, 5>());
          if (number_of_taps == 4) add(std::integral_constant<int, 4>());
        }
        if (number_of_taps == 3) add(std::integral_constant<int, 3>());
        if (number_of_taps == 2) add(std::integral_constant<int, 2>());
        if (number_of_taps == 1) add(std::integral_constant<int, 1>());
        t += number_of_taps;
      }
    }
  }
}

// Sums the products of the weight's gradient over rows, on one thread.
template <typename scalar_t>
class RowProducts {
 public:
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;

  static int64_t vectors(const Map& map) { return map.taps(); }

  RowProducts(const Map& map, const Columns& columns, const scalar_t* input, const scalar_t* grad_output)
      : map_(map), columns_(columns), grad_output_(grad_output),
        source_(input, map.images * map.channels, map.rows, columns), row_taps_(map.rows.kernel),
        tap_sums_(map.rows.kernel) {}

  // lanes [R S] += the products of row y of the plane.
  void add(int64_t plane, int64_t y, vector_t* lanes) {
    const int64_t width = map_.columns.output, elements = map_.images * map_.channels * map_.rows.output * width;
    int64_t count = 0;
    map_.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
      row_taps_[count] = {source_.row(plane, source_y, tap.index), nullptr};
      tap_sums_[count++] = lanes + tap.index * map_.columns.kernel;
    });
    const int64_t offset = (plane * map_.rows.output + y) * width;
    const scalar_t* grad = grad_output_ + offset;
    scalar_t copy[kLanes] = {};
    if (offset + kLanes > elements) grad = std::copy_n(grad, width, copy) - width;
    add_row_products(columns_.phases[0], grad, row_taps_.data(), tap_sums_.data(), count);
  }

  // Adds the sum of lanes[tap] to own[tap] and clears the lanes.
  static void flush(vector_t* lanes, int64_t taps, double* own) {
    for (int64_t tap = 0; tap < taps; ++tap) own[tap] += simd::reduce_add(lanes[tap]);
    std::fill_n(lanes, taps, vector_t{});
  }

 private:
  const Map& map_;
  const Columns& columns_;
  const scalar_t* grad_output_;
  SourceRows<scalar_t> source_;
  std::vector<RowTap<scalar_t>> row_taps_;
  std::vector<vector_t*> tap_sums_;
};

// [C][R S] sums of the products of the input and grad_output [N, C, OH, OW] elements that a tap joins: in fp32 over one
// plane, in fp64 over all planes.
template <template <typename> class Products, typename scalar_t>
std::vector<double> sum_weights_of_rows(const Map& map, const scalar_t* input, const scalar_t* grad_output) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  const Columns columns(map.columns, /*each_once=*/true, INT64_MAX);
  const int64_t height = map.rows.output, taps = map.taps(), rows = map.images * height;
  // If there are few channels, the rows of each are cut into parts.
  const int64_t slice = map.smallest_slice(1), items = 4 * slice_count(map.channels * rows, slice);
  const int64_t parts = std::max<int64_t>(1, std::min(rows, ceil_divide(items, map.channels)));
  std::vector<double> sums(map.channels * parts * taps);
  const UnevenSlices slices(map.channels * parts, ceil_divide(slice * parts, std::max<int64_t>(1, rows)));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    Products<scalar_t> products(map, columns, input, grad_output);
    const Scratch<vector_t> lanes(products.vectors(map));
    std::fill_n(lanes.get(), products.vectors(map), vector_t{});
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item / parts, part = item % parts;
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      for (int64_t row = first; row < last; ++row) {
        products.add(row / height * map.channels + channel, row % height, lanes.get());
        if (row % height == height - 1 || row == last - 1) products.flush(lanes.get(), taps, sums.data() + item * taps);
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
