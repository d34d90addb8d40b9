// Strided depthwise convolutions of NCHW images by rows of 16 taps (the backward of an upsampling by 8): lanes are the
// taps of a row, and nothing is split into phases. At an output, a row of the kernel reads one vector of the source.
// For outputs the lanes are added up at the end; for the weight they are the sums of its taps.
#pragma once

#include "convolution/depthwise_rows.h"

namespace fastseg::depthwise {

class Wide {
 public:
  static bool fits(const Map& map) {
    const std::vector<Tap>& taps = map.columns.phases[0].taps;
    if (map.columns.source_step < 4 || map.rows.output_step != 1 || taps.size() != kLanes) return false;
    return map.columns.kernel == kLanes && place(map, taps[kLanes - 1]) - place(map, taps[0]) == kLanes - 1;
  }

  explicit Wide(const Map& map)
      : step(map.columns.source_step), left(place(map, map.columns.phases[0].taps[0])),
        first(map.columns.phases[0].taps[0].first), end(map.columns.phases[0].taps[kLanes - 1].end),
        taps_(map.columns.phases[0].taps) {}

  const int64_t step, left;  // output k reads elements left + k step + lane
  const int64_t first, end;  // outputs with all taps inside of the source

  // The lanes of output k that are inside of the source.
  uint16_t inside(int64_t k) const {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t{taps_[lane].first <= k && k < taps_[lane].end} << lane;
    return static_cast<uint16_t>(bits);
  }

 private:
  // The element that a tap reads for output 0.
  static int64_t place(const Map& map, const Tap& tap) { return tap.phase + tap.offset * map.columns.source_step; }

  const std::vector<Tap>& taps_;
};

// Elements [at, at + 16) of `elements`; lanes outside of them are 0.
template <typename scalar_t>
FASTSEG_INLINE auto load_within(const scalar_t* data, int64_t elements, int64_t at) {
  if (at >= 0 && at + kLanes <= elements) return simd::load(data + at);
  alignas(64) scalar_t buffer[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (at + i >= 0 && at + i < elements) buffer[i] = data[at + i];
  }
  return simd::load(buffer);
}

// Lane i is the sum of sums[i], which are overwritten.
template <typename vector_t>
FASTSEG_INLINE vector_t sum_each(vector_t (&sums)[kLanes]) {
  FASTSEG_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    FASTSEG_UNROLL
    for (int i = 0; i < half; ++i) {
      sums[i] = simd::interleave_low(sums[i], sums[i + half]) + simd::interleave_high(sums[i], sums[i + half]);
    }
  }
  return sums[0];
}

template <typename scalar_t>
void map_wide(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
              const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  constexpr int kOutputs = 2 * kRun;  // whose sums stay in registers
  const Wide wide(map);
  const int64_t height = map.rows.output, width = map.columns.output;
  const int64_t elements = map.images * map.channels * map.rows.source * map.columns.source;
  const UnevenSlices slices(map.images * map.channels * height, map.smallest_slice(1));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    std::vector<RowTap<scalar_t>> row_taps(map.rows.kernel);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / height, y = row % height, channel = plane % map.channels;
      int64_t count = 0;
      map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
        row_taps[count++] = {input + (plane * map.rows.source + source_y) * map.columns.source,
                             weights.data() + channel * map.taps() + tap.index * kLanes};
      });
      const ImageView<scalar_t>& residual = epilogue.residual;
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, width));
      const RowWriter<scalar_t> finish{epilogue,
                                       epilogue.bias_of(channel),
                                       residual.data ? residual.at(plane / map.channels, channel, y, 0) : nullptr,
                                       residual.column,
                                       output + row * width,
                                       lanes,
                                       lanes,
                                       /*streamed=*/false};
      for (int64_t x = 0; x < width; x += kLanes) {
        const int64_t first = std::max<int64_t>(0, std::min(x, width - kLanes));
        vector_t all[kLanes] = {};
        for (int i = 0; i < lanes; i += kOutputs) {
          const int64_t k = first + i;
          if (wide.first <= k && k + kOutputs <= wide.end) {
            vector_t sums[kOutputs];
            FASTSEG_UNROLL
            for (int o = 0; o < kOutputs; ++o) sums[o] = vector_t{};
            for (int64_t r = 0; r < count; ++r) {
              const vector_t weight = simd::load(row_taps[r].weights);
              const scalar_t* from = row_taps[r].data + wide.left + k * wide.step;
              FASTSEG_UNROLL
              for (int o = 0; o < kOutputs; ++o) sums[o] += simd::load(from + o * wide.step) * weight;
            }
            FASTSEG_UNROLL
            for (int o = 0; o < kOutputs; ++o) all[i + o] = sums[o];
            continue;
          }
          for (int o = 0; o < kOutputs && i + o < lanes; ++o) {
            vector_t sum{};
            for (int64_t r = 0; r < count; ++r) {
              const int64_t at = row_taps[r].data - input + wide.left + (k + o) * wide.step;
              sum += load_within(input, elements, at) * simd::load(row_taps[r].weights);
            }
            all[i + o] = simd::select_bits(wide.inside(k + o), sum, vector_t{});
          }
        }
        finish(first, sum_each(all));
      }
    }
  });
}

// As RowProducts, for `Wide` maps: see sum_weights_of_rows().
template <typename scalar_t>
class WideProducts {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;

  static int64_t vectors(const Map& map) { return map.rows.kernel; }  // one per row of taps

  WideProducts(const Map& map, const Columns& /*columns*/, const scalar_t* input, const scalar_t* grad_output)
      : map_(map), wide_(map), input_(input), grad_output_(grad_output), row_taps_(map.rows.kernel) {}

  // lanes [R] += the products of row y of the plane.
  void add(int64_t plane, int64_t y, vector_t* lanes) {
    const int64_t width = map_.columns.output, source_width = map_.columns.source;
    const scalar_t* grad = grad_output_ + (plane * map_.rows.output + y) * width;
    int64_t count = 0;
    map_.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
      row_taps_[count++] = {input_ + (plane * map_.rows.source + source_y) * source_width + wide_.left,
                            lanes + tap.index};
    });
    for (int64_t r = 0; r < count;) {
      const auto add_some = [&](auto rows) FASTSEG_ALWAYS_INLINE {
        if (count - r >= decltype(rows)::value) add_rows<decltype(rows)::value>(grad, row_taps_.data() + r), r += rows;
      };
      if constexpr (simd::kRegisterBytes == 64) add_some(std::integral_constant<int, 16>());
      add_some(std::integral_constant<int, 4>());
      if (count - r < 4) add_some(std::integral_constant<int, 1>());
    }
    const int64_t elements = map_.images * map_.channels * map_.rows.source * source_width;
    for (int64_t k = 0; k < width; ++k) {
      if (k == wide_.first) k = std::max(k, wide_.end);
      if (k >= width) break;
      const uint16_t inside = wide_.inside(k);
      for (int64_t r = 0; r < count; ++r) {
        const vector_t values = load_within(input_, elements, row_taps_[r].data - input_ + k * wide_.step);
        vector_t& sum = *row_taps_[r].sum;
        sum = simd::select_bits(inside, sum + values * static_cast<accumulate_t>(grad[k]), sum);
      }
    }
  }

  // Adds the sums to own [R S] and clears them.
  static void flush(vector_t* lanes, int64_t taps, double* own) {
    for (int64_t tap = 0; tap < taps; ++tap) own[tap] += lanes[tap / kLanes][tap % kLanes];
    std::fill_n(lanes, taps / kLanes, vector_t{});
  }

 private:
  struct SourceRow {
    const scalar_t* data;  // the element that output 0 reads
    vector_t* sum;
  };

  // The outputs with all taps inside.
  template <int rows>
  FASTSEG_INLINE void add_rows(const scalar_t* grad, const SourceRow* row_taps) const {
    vector_t sums[rows];
    const scalar_t* from[rows];
    FASTSEG_UNROLL
    for (int r = 0; r < rows; ++r) sums[r] = vector_t{}, from[r] = row_taps[r].data;
    for (int64_t k = wide_.first; k < wide_.end; ++k) {
      const vector_t value = vector_t{} + static_cast<accumulate_t>(grad[k]);
      FASTSEG_UNROLL
      for (int r = 0; r < rows; ++r) sums[r] += simd::load(from[r] + k * wide_.step) * value;
    }
    FASTSEG_UNROLL
    for (int r = 0; r < rows; ++r) *row_taps[r].sum += sums[r];
  }

  const Map& map_;
  const Wide wide_;
  const scalar_t* input_;
  const scalar_t* grad_output_;
  std::vector<SourceRow> row_taps_;
};

}  // namespace fastseg::depthwise
