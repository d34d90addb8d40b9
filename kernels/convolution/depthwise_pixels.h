// Depthwise convolutions of channels_last images: lanes are 16 channels of a pixel.
//
// A row is cut into intervals of outputs with the same taps inside; within one, weights are loaded once for several
// pixels. No lane is masked: where C is no multiple of 16 the last vector repeats channels of the one before.
#pragma once

#include <type_traits>

#include "convolution/depthwise_axis.h"

namespace fastseg::depthwise {

// Whether a load of 16 channels at the last pixel of `row`, one of `rows` rows of `elements`, could leave the tensor.
inline bool ends_memory(int64_t row, int64_t rows, int64_t elements) { return (rows - 1 - row) * elements < kLanes; }

// For outputs [first, last) of a phase its taps [begin, end) are inside of the source.
struct Interval {
  int64_t first, last;
  int begin, end;
};

inline std::vector<Interval> intervals_of(const Phase& phase) {
  std::vector<int64_t> cuts{0, phase.outputs};
  for (const Tap& tap : phase.taps) cuts.insert(cuts.end(), {tap.first, tap.end});
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<Interval> intervals;
  const int taps = static_cast<int>(phase.taps.size());
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    Interval interval{cuts[i], cuts[i + 1], 0, 0};
    const auto sees = [&](int t) {
      return phase.taps[t].first <= interval.first && interval.last <= phase.taps[t].end;
    };
    while (interval.begin < taps && !sees(interval.begin)) ++interval.begin;
    interval.end = interval.begin;
    while (interval.end < taps && sees(interval.end)) ++interval.end;
    intervals.push_back(interval);
  }
  return intervals;
}

inline std::vector<std::vector<Interval>> intervals_of(const Axis& axis) {
  std::vector<std::vector<Interval>> intervals;
  for (const Phase& phase : axis.phases) intervals.push_back(intervals_of(phase));
  return intervals;
}

// 16 channels of a pixel; if `partial`, the first `lanes_used` of them.
template <bool partial, typename scalar_t>
FASTSEG_INLINE auto load_channels(const scalar_t* from, int lanes_used) {
  if constexpr (partial) {
    return simd::load_partial(from, lanes_used, scalar_t(0));
  } else {
    return simd::load(from);
  }
}

// A row of the source that a row of outputs reads: `data` is its pixel 0, `weights` [S][padded(C)].
template <typename scalar_t>
struct PixelTap {
  const scalar_t* data;
  const simd::accumulate<scalar_t>* weights;
};

// A row of outputs [OW][C], with the epilogue and stores of its sums.
template <typename scalar_t>
struct PixelRow {
  const Epilogue<scalar_t>& epilogue;
  int64_t channels, weight_stride;
  scalar_t* to;
  const scalar_t* residual;  // of the row, or null

  template <typename vector_t>
  FASTSEG_INLINE void finish(int64_t x, int64_t channel, vector_t sums, int count) const {
    if (!epilogue.bias.empty()) sums += simd::load(epilogue.bias.data() + channel);
    if (residual) {
      const ImageView<scalar_t>& view = epilogue.residual;
      sums += load_strided(residual + x * view.column + channel * view.channel, view.channel, count);
    }
    store_first(to + x * channels + channel, epilogue.rectified(sums), count);
  }
};

// The sums of kPixels x kVectors vectors of channels stay in registers.
constexpr int kPixels = simd::kRegisterBytes >= 32 ? 4 : 2;
constexpr int kVectors = simd::kRegisterBytes == 64 ? 2 : 1;

// Outputs k, k + 1, ... (`pixels`) of the phase, channels [channel, channel + 16 `vectors`).
template <int pixels, int vectors, bool partial, typename scalar_t>
FASTSEG_INLINE void sum_pixels(const Axis& axis, int64_t phase, const Interval& interval, int64_t k, int64_t channel,
                               const PixelTap<scalar_t>* rows, int64_t count, const PixelRow<scalar_t>& row,
                               int lanes_used) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  const Tap* taps = axis.phases[phase].taps.data();
  const int64_t step = axis.source_step * row.channels;
  vector_t sums[pixels][vectors];
  FASTSEG_UNROLL
  for (int x = 0; x < pixels; ++x) {
    FASTSEG_UNROLL
    for (int v = 0; v < vectors; ++v) sums[x][v] = vector_t{};
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int t = interval.begin; t < interval.end; ++t) {
      const Tap& tap = taps[t];
      const int64_t pixel = tap.phase + (k + tap.offset) * axis.source_step;
      const scalar_t* from = rows[r].data + pixel * row.channels + channel;
      const auto* weights = rows[r].weights + tap.index * row.weight_stride + channel;
      vector_t weight[vectors];
      FASTSEG_UNROLL
      for (int v = 0; v < vectors; ++v) weight[v] = simd::load(weights + v * kLanes);
      FASTSEG_UNROLL
      for (int x = 0; x < pixels; ++x) {
        FASTSEG_UNROLL
        for (int v = 0; v < vectors; ++v) {
          sums[x][v] += weight[v] * load_channels<partial>(from + x * step + v * kLanes, lanes_used);
        }
      }
    }
  }
  FASTSEG_UNROLL
  for (int x = 0; x < pixels; ++x) {
    FASTSEG_UNROLL
    for (int v = 0; v < vectors; ++v) {
      row.finish(phase + (k + x) * axis.output_step, channel + v * kLanes, sums[x][v], lanes_used);
    }
  }
}

template <int pixels, bool partial, typename scalar_t>
void sum_channels(const Axis& axis, int64_t phase, const Interval& interval, int64_t k, const PixelTap<scalar_t>* rows,
                  int64_t count, const PixelRow<scalar_t>& row, int lanes_used) {
  int64_t channel = 0;
  if constexpr (!partial && kVectors == 2) {
    for (; channel + 2 * kLanes <= row.channels; channel += 2 * kLanes) {
      sum_pixels<pixels, 2, partial>(axis, phase, interval, k, channel, rows, count, row, lanes_used);
    }
  }
  for (; channel < row.channels; channel += kLanes) {
    const int64_t first = std::max<int64_t>(0, std::min(channel, row.channels - kLanes));
    sum_pixels<pixels, 1, partial>(axis, phase, interval, k, first, rows, count, row, lanes_used);
  }
}

template <bool partial, typename scalar_t>
void sum_interval(const Axis& axis, int64_t phase, const Interval& interval, const PixelTap<scalar_t>* rows,
                  int64_t count, const PixelRow<scalar_t>& row, int lanes_used) {
  for (int64_t k = interval.first; k < interval.last;) {
    if (interval.last - interval.first < kPixels) {
      sum_channels<1, partial>(axis, phase, interval, k++, rows, count, row, lanes_used);
      continue;
    }
    const int64_t first = std::min(k, interval.last - kPixels);  // the last ones may repeat some of those before
    sum_channels<kPixels, partial>(axis, phase, interval, first, rows, count, row, lanes_used);
    k = first + kPixels;
  }
}

template <typename scalar_t>
void map_pixels(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
                const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  const auto intervals = intervals_of(map.columns);
  const int64_t height = map.rows.output, channels = map.channels, weight_stride = padded(channels);
  const int64_t source_row = map.columns.source * channels, output_row = map.columns.output * channels;
  const int lanes_used = static_cast<int>(std::min<int64_t>(kLanes, channels));
  const UnevenSlices slices(map.images * height, map.smallest_slice(channels));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    std::vector<PixelTap<scalar_t>> row_taps(map.rows.kernel);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      int64_t count = 0;
      bool near_end = false;
      map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
        const int64_t number = image * map.rows.source + source_y;
        row_taps[count++] = {input + number * source_row,
                             weights.data() + tap.index * map.columns.kernel * weight_stride};
        near_end = near_end || ends_memory(number, map.images * map.rows.source, source_row);
      });
      PixelRow<scalar_t> to{epilogue, channels, weight_stride, output + row * output_row, nullptr};
      if (epilogue.residual.data) to.residual = epilogue.residual.at(image, 0, y, 0);
      for (size_t phase = 0; phase < intervals.size(); ++phase) {
        for (const Interval& interval : intervals[phase]) {
          if (lanes_used < kLanes && near_end) {
            sum_interval<true>(map.columns, phase, interval, row_taps.data(), count, to, lanes_used);
          } else {
            sum_interval<false>(map.columns, phase, interval, row_taps.data(), count, to, lanes_used);
          }
        }
      }
    }
  });
}

// Pixels of the source that a tap joins to pixels of the gradient, and the sums of their products, one per channel.
template <typename scalar_t>
struct ProductTap {
  const scalar_t* from;
  simd::accumulate<scalar_t>* sums;
};

constexpr int kTaps = simd::kRegisterBytes == 64 ? 9 : 3;  // taps whose sums stay in registers

// Sums products for one vector of channels, over `pixels` pixels; in the source they are `step` elements apart.
template <int taps, bool partial, typename scalar_t>
FASTSEG_INLINE void add_pixel_products(const ProductTap<scalar_t>* products, const scalar_t* grad, int64_t pixels,
                                       int64_t step, int64_t channels, int64_t channel, int lanes_used) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  const scalar_t* from[taps];
  vector_t sums[taps];
  FASTSEG_UNROLL
  for (int i = 0; i < taps; ++i) {
    from[i] = products[i].from + channel;
    sums[i] = vector_t{};
  }
  for (int64_t x = 0; x < pixels; ++x) {
    const vector_t values = load_channels<partial>(grad + x * channels + channel, lanes_used);
    FASTSEG_UNROLL
    for (int i = 0; i < taps; ++i) sums[i] += values * load_channels<partial>(from[i] + x * step, lanes_used);
  }
  FASTSEG_UNROLL
  for (int i = 0; i < taps; ++i) {
    simd::store(products[i].sums + channel, simd::load(products[i].sums + channel) + sums[i]);
  }
}

// `near_end`: a load at the last pixel could leave the tensor. Otherwise the last vector also reads the next pixel, and
// those lanes are not used.
template <int taps, bool near_end, typename scalar_t>
void add_products_of(int64_t count, const ProductTap<scalar_t>* products, const scalar_t* grad, int64_t pixels,
                     int64_t step, int64_t channels, int64_t group) {
  if constexpr (taps > 1) {
    if (count < taps) return add_products_of<taps - 1, near_end>(count, products, grad, pixels, step, channels, group);
  }
  int64_t channel = 0;
  for (; channel + kLanes <= group; channel += kLanes) {
    add_pixel_products<taps, false>(products, grad, pixels, step, channels, channel, kLanes);
  }
  if (channel < group) {
    add_pixel_products<taps, near_end>(products, grad, pixels, step, channels, channel,
                                       static_cast<int>(group - channel));
  }
}

// A group of channels, and a part of the rows of all images.
struct ProductItem {
  int64_t channel, channels;  // its first one, how many
  int64_t first, last;        // rows of the gradient
};

// Adds the sums of `item` to own[R S][padded(C)]; lanes [R S][padded(item.channels)] is scratch.
template <typename scalar_t>
void sum_products(const Map& map, const std::vector<Interval>& intervals, const scalar_t* input,
                  const scalar_t* grad_output, const ProductItem& item, simd::accumulate<scalar_t>* lanes,
                  double* own) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const Axis& columns = map.columns;
  const int64_t height = map.rows.output, taps = map.taps(), stride = padded(item.channels);
  const int64_t step = columns.source_step * map.channels;
  std::vector<ProductTap<scalar_t>> rows(map.rows.kernel), products(taps);
  std::fill_n(lanes, taps * stride, accumulate_t(0));
  for (int64_t row = item.first; row < item.last; ++row) {
    const int64_t image = row / height, y = row % height;
    const scalar_t* grad = grad_output + row * columns.output * map.channels + item.channel;
    int64_t count = 0;
    bool near_end = ends_memory(row, map.images * height, columns.output * map.channels);
    map.rows.for_each_tap(y, [&](const Tap& tap, int64_t source_y) {
      const int64_t source_row = image * map.rows.source + source_y;
      near_end = near_end || ends_memory(source_row, map.images * map.rows.source, columns.source * map.channels);
      rows[count++] = {input + source_row * columns.source * map.channels + item.channel,
                       lanes + tap.index * columns.kernel * stride};
    });
    for (const Interval& interval : intervals) {
      int64_t pairs = 0;
      for (int64_t r = 0; r < count; ++r) {
        for (int t = interval.begin; t < interval.end; ++t) {
          const Tap& tap = columns.phases[0].taps[t];
          const int64_t pixel = tap.phase + (interval.first + tap.offset) * columns.source_step;
          products[pairs++] = {rows[r].from + pixel * map.channels, rows[r].sums + tap.index * stride};
        }
      }
      const scalar_t* from = grad + interval.first * map.channels;
      const int64_t pixels = interval.last - interval.first;
      for (int64_t i = 0; i < pairs; i += kTaps) {
        if (near_end) {
          add_products_of<kTaps, true>(pairs - i, products.data() + i, from, pixels, step, map.channels, item.channels);
        } else {
          add_products_of<kTaps, false>(pairs - i, products.data() + i, from, pixels, step, map.channels,
                                        item.channels);
        }
      }
    }
    if (y == height - 1 || row == item.last - 1) {  // in fp32 over one image, in fp64 over all of them
      for (int64_t tap = 0; tap < taps; ++tap) {
        double* to = own + tap * padded(map.channels) + item.channel;
        for (int64_t c = 0; c < item.channels; ++c) to[c] += lanes[tap * stride + c];
      }
      std::fill_n(lanes, taps * stride, accumulate_t(0));
    }
  }
}

// [R S][padded(C)] sums of the products of the input and grad_output [N, C, OH, OW] elements that a tap joins.
template <typename scalar_t>
std::vector<double> sum_weights_of_pixels(const Map& map, const scalar_t* input, const scalar_t* grad_output) {
  constexpr int64_t kGroup = 64;  // channels of an item: lanes_used enough for its sums to stay in the cache
  const std::vector<Interval> intervals = intervals_of(map.columns.phases[0]);
  const int64_t groups = ceil_divide(map.channels, kGroup), rows = map.images * map.rows.output;
  const int64_t smallest = map.smallest_slice(std::min(map.channels, kGroup));
  const int64_t wanted = ceil_divide(slice_count(rows), groups);
  const int64_t parts = std::max<int64_t>(1, std::min(slice_count(rows, smallest), wanted));
  const int64_t size = map.taps() * padded(map.channels);
  std::vector<double> sums(parts * size);
  const UnevenSlices slices(groups * parts, ceil_divide(smallest * parts, std::max<int64_t>(1, rows)));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    std::vector<simd::accumulate<scalar_t>> lanes(map.taps() * kGroup);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t part = index % parts, channel = index / parts * kGroup;
      const ProductItem item{channel, std::min(kGroup, map.channels - channel), rows * part / parts,
                             rows * (part + 1) / parts};
      sum_products(map, intervals, input, grad_output, item, lanes.data(), sums.data() + part * size);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  }
  return sums;
}

}  // namespace fastseg::depthwise
