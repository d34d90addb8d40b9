// Depthwise convolutions of NCHW images with rows of up to 128 elements and strides of up to 4: lanes are 16
// neighbours of a plane, whatever rows they lie in.
//
// Where rows are as long in source and outputs a tap is a shift of the whole plane. Strides are split into phases: for
// a stride of 2, a plane of the source (or of the outputs) is four planes of half the extents, every second row and
// column, whose rows are as long as those of the other side. Rows end anywhere in a vector: which lanes have a tap
// inside of the source is the same in all planes, and found once.
#pragma once

#include <type_traits>

#include "convolution/depthwise_wide.h"

namespace fastseg::depthwise {

constexpr int kGroup = 64;  // pixels of a plane handled at a time
constexpr int kGroupVectors = kGroup / kLanes;
// Vectors whose sums stay in registers.
constexpr int kSums = simd::kRegisterBytes >= 32 ? 4 : 2;

struct FlatTap {
  int64_t index;                   // in the kernel
  int64_t shift;                   // of the plane
  uint16_t inside[kGroupVectors];  // a bit for each lane
};

// One phase of the outputs.
struct FlatPhase {
  int64_t pixels;
  std::vector<FlatTap> taps;  // group by group: the taps that are inside of the source for any lane
  std::vector<int> ends;      // one past the last tap of each group
};

struct Flat {
  int64_t source_step, output_step;  // along both axes
  int64_t pitch;                     // elements from one row of a phase to the next, in the source and the outputs
  int64_t source_room, output_room;  // elements from one phase to the next
  std::vector<FlatPhase> phases;     // of the outputs

  static bool fits(const Map& map) {
    constexpr int64_t kWidest = 128;  // longer rows are mostly full vectors
    constexpr int64_t kMostStep = 4;
    const Axis &rows = map.rows, &columns = map.columns;
    if (rows.source_step != columns.source_step || rows.output_step != columns.output_step) return false;
    if (map.images * map.channels < std::max<int64_t>(8, 2 * slice_count(INT64_MAX))) return false;
    const int64_t step = columns.source_step * columns.output_step;  // one of them is 1
    const int64_t pitch = columns.output_step == 1 ? columns.output : columns.source;
    if (step > kMostStep || pitch > kWidest) return false;
    if (step == 1) return columns.source == columns.output;
    if (columns.output_step == 1) return columns.elements(0) <= pitch;
    const auto phases = static_cast<size_t>(step);
    return columns.phases[0].outputs <= pitch && rows.phases.size() == phases && columns.phases.size() == phases;
  }

  explicit Flat(const Map& map)
      : source_step(map.columns.source_step), output_step(map.columns.output_step),
        pitch(output_step == 1 ? map.columns.output : map.columns.source),
        source_room(map.rows.elements(0) * pitch + kGroup), output_room(map.rows.phases[0].outputs * pitch + kGroup) {
    for (const Phase& rows : map.rows.phases) {
      for (const Phase& columns : map.columns.phases) add_phase(map, rows, columns);
    }
  }

 private:
  using Bits = std::vector<uint64_t>;  // one for each pixel

  void add_phase(const Map& map, const Phase& rows, const Phase& columns) {
    FlatPhase phase{rows.outputs * pitch, {}, {}};
    std::vector<Bits> bits;
    std::vector<FlatTap> all;
    for (const Tap& row : rows.taps) {
      for (const Tap& column : columns.taps) {
        const int64_t source_phase = row.phase * source_step + column.phase;
        const int64_t shift = source_phase * source_room + row.offset * pitch + column.offset;
        all.push_back({row.index * map.columns.kernel + column.index, shift, {}});
        bits.emplace_back(ceil_divide(phase.pixels, kGroup));
        for (int64_t y = row.first; y < row.end; ++y) {
          set_bits(bits.back(), y * pitch + column.first, y * pitch + column.end);
        }
      }
    }
    for (int64_t word = 0; word * kGroup < phase.pixels; ++word) {
      for (size_t tap = 0; tap < all.size(); ++tap) {
        const uint64_t inside = bits[tap][word];
        if (inside == 0) continue;
        phase.taps.push_back(all[tap]);
        for (int v = 0; v < kGroupVectors; ++v) phase.taps.back().inside[v] = inside >> (v * kLanes) & 0xffff;
      }
      phase.ends.push_back(static_cast<int>(phase.taps.size()));
    }
    phases.push_back(std::move(phase));
  }

  static void set_bits(Bits& words, int64_t first, int64_t end) {
    while (first < end) {
      const int64_t bit = first % kGroup, count = std::min(end - first, kGroup - bit);
      words[first / kGroup] |= (~uint64_t{0} >> (kGroup - count)) << bit;
      first += count;
    }
  }
};

// Planes of a source [planes, H, W] as a Flat needs them: in place, or copied, split into phases and widened.
template <typename scalar_t>
class FlatSource {
 public:
  using accumulate_t = simd::accumulate<scalar_t>;

  FlatSource(const Map& map, const Flat& flat, const scalar_t* data)
      : flat_(flat), data_(data), height_(map.rows.source), width_(map.columns.source),
        elements_(map.images * map.channels * height_ * width_), copies_(kWidens || flat.source_step > 1),
        copy_(copies_ ? 2 * kGroup + flat.source_step * flat.source_step * flat.source_room : 0) {}

  // Pixel 0 of a plane, any group of which can be loaded with any shift that has a lane inside; null if such loads
  // would leave the tensor. Valid until the next call.
  const accumulate_t* plane(int64_t index) {
    const int64_t first = index * height_ * width_, end = first + height_ * width_;
    if (copies_) return copy(first);
    if constexpr (!kWidens) {
      if (first >= kGroup && end + kGroup <= elements_) return data_ + first;
    }
    return nullptr;
  }

 private:
  static constexpr bool kWidens = !std::is_same_v<scalar_t, accumulate_t>;  // once, not for every tap

  const accumulate_t* copy(int64_t first) {
    accumulate_t* const to = copy_.get() + kGroup;
    const scalar_t* from = data_ + first;
    if (flat_.source_step == 1) {
      const int64_t count = height_ * width_;
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) simd::store(to + i, simd::load(from + i));
      for (; i < count; ++i) to[i] = static_cast<accumulate_t>(from[i]);
      return to;
    }
    for (int64_t y = 0; y < height_; ++y, from += width_) {
      const int64_t step = flat_.source_step;
      split(from, elements_ - (from - data_), to + y % step * step * flat_.source_room + y / step * flat_.pitch);
    }
    return to;
  }

  // Splits a row into its phases. The next row overwrites what is stored past the end of a phase's row.
  void split(const scalar_t* from, int64_t readable, accumulate_t* to) const {
    constexpr int64_t kWorthAVector = 4;  // elements
    const int64_t step = flat_.source_step, room = flat_.source_room;
    int64_t done = 0;
    if (step == 2) {
      for (; done + kWorthAVector < width_ && done + 2 * kLanes <= readable; done += 2 * kLanes) {
        const auto low = simd::load(from + done), high = simd::load(from + done + kLanes);
        simd::store(to + done / 2, simd::every_second<0>(low, high));
        simd::store(to + room + done / 2, simd::every_second<1>(low, high));
      }
    }
    for (int64_t phase = 0; phase < step; ++phase) {
      accumulate_t* part = to + phase * room + done / step;
      for (int64_t x = done + phase; x < width_; x += step) *part++ = static_cast<accumulate_t>(from[x]);
    }
  }

  const Flat& flat_;
  const scalar_t* data_;
  int64_t height_, width_, elements_;
  bool copies_;
  Scratch<accumulate_t> copy_;
};

// Calls body(first pixel, sums) for every vector of a phase; the sums include `bias`.
template <typename accumulate_t, typename Body>
FASTSEG_INLINE void sum_flat(const FlatPhase& phase, const accumulate_t* source, const accumulate_t* weights,
                             accumulate_t bias, const Body& body) {
  using vector_t = simd::vec<accumulate_t>;
  int begin = 0;
  for (size_t index = 0; index < phase.ends.size(); ++index) {
    for (int first = 0; first < kGroupVectors; first += kSums) {
      const int64_t pixel = static_cast<int64_t>(index) * kGroup + first * kLanes;
      vector_t sums[kSums];
      FASTSEG_UNROLL
      for (int v = 0; v < kSums; ++v) sums[v] = vector_t{} + bias;
      for (int t = begin; t < phase.ends[index]; ++t) {
        const FlatTap& tap = phase.taps[t];
        const accumulate_t* from = source + pixel + tap.shift;
        const accumulate_t weight = weights[tap.index];
        FASTSEG_UNROLL
        for (int v = 0; v < kSums; ++v) {
          const vector_t more = sums[v] + simd::load(from + v * kLanes) * weight;
          sums[v] = simd::select_bits(tap.inside[first + v], more, sums[v]);
        }
      }
      FASTSEG_UNROLL
      for (int v = 0; v < kSums; ++v) {
        if (pixel + v * kLanes < phase.pixels) body(pixel + v * kLanes, sums[v]);
      }
    }
    begin = phase.ends[index];
  }
}

// Applies the epilogue to a plane of outputs and stores it. If `spills`, the last vector is written whole: the next
// plane overwrites what lies beyond the end.
template <typename scalar_t>
struct PlaneWriter {
  const Epilogue<scalar_t>& epilogue;
  const scalar_t* residual;
  scalar_t* to;
  int64_t pixels;
  bool spills;
  int64_t stored_as_is;  // vectors that start before this pixel are stored whole, without an epilogue

  PlaneWriter(const Epilogue<scalar_t>& epilogue, const scalar_t* residual, scalar_t* to, int64_t pixels, bool spills)
      : epilogue(epilogue), residual(residual), to(to), pixels(pixels), spills(spills),
        stored_as_is(residual || epilogue.relu ? 0
                     : spills                  ? pixels
                                               : pixels - kLanes + 1) {}

  template <typename vector_t>
  FASTSEG_INLINE void operator()(int64_t pixel, vector_t sums) const {
    if (pixel < stored_as_is) return simd::store(to + pixel, sums);
    const int count = static_cast<int>(std::min<int64_t>(kLanes, pixels - pixel));
    if (residual) {
      const int64_t step = epilogue.residual.column;
      sums += load_strided(residual + pixel * step, step, count);
    }
    store_first(to + pixel, epilogue.rectified(sums), spills ? kLanes : count);
  }
};

// Interleaves the phases [output_room] of a plane of outputs; `row` is scratch for one row.
template <typename scalar_t>
void join_phases(const Map& map, const Flat& flat, const simd::accumulate<scalar_t>* parts,
                 simd::accumulate<scalar_t>* row, const PlaneWriter<scalar_t>& finish) {
  const int64_t width = map.columns.output, step = flat.output_step;
  for (int64_t y = 0; y < map.rows.output; ++y) {
    const auto* first = parts + y % step * step * flat.output_room + y / step * flat.pitch;
    if (step > 2) {
      detail::transpose(first, flat.output_room, row, step, step, flat.pitch);
      for (int64_t x = 0; x < width; x += kLanes) finish(y * width + x, simd::load(row + x));
      continue;
    }
    for (int64_t x = 0; x < width; x += 2 * kLanes) {
      const auto even = simd::load(first + x / 2), odd = simd::load(first + flat.output_room + x / 2);
      finish(y * width + x, simd::interleave_low(even, odd));
      if (x + kLanes < width) finish(y * width + x + kLanes, simd::interleave_high(even, odd));
    }
  }
}

template <typename scalar_t>
void map_planes(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
                const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const ImageView<scalar_t>& residual = epilogue.residual;
  const bool flat_residual = residual.data == nullptr || residual.row == residual.column * map.columns.output;
  if (Wide::fits(map)) return map_wide(map, input, weights, epilogue, output);
  if (!flat_residual || !Flat::fits(map)) return map_rows(map, input, weights, epilogue, output);
  const Flat flat(map);
  const Columns columns(map.columns, /*each_once=*/false, kRun);
  const int64_t height = map.rows.output, pixels = height * map.columns.output;
  const UnevenSlices slices(map.images * map.channels, ceil_divide(map.smallest_slice(1), height));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    RowMap<scalar_t> rows(map, columns, input, weights, epilogue, output);
    FlatSource<scalar_t> sources(map, flat, input);
    const int64_t phases = flat.output_step * flat.output_step;
    std::optional<Scratch<accumulate_t>> parts;  // the phases, then a row
    if (phases > 1) parts.emplace(phases * flat.output_room + flat.output_step * flat.pitch + kLanes);
    for (int64_t plane = begin; plane < end; ++plane) {
      const accumulate_t* source = sources.plane(plane);
      if (source == nullptr) {
        rows.run(plane * height, (plane + 1) * height);
        continue;
      }
      const int64_t image = plane / map.channels, channel = plane % map.channels;
      const accumulate_t* own = weights.data() + channel * map.taps();
      const accumulate_t bias = epilogue.bias_of(channel);
      const PlaneWriter<scalar_t> finish(epilogue, residual.data ? residual.at(image, channel, 0, 0) : nullptr,
                                         output + plane * pixels, pixels, plane + 1 < end && pixels >= kLanes);
      if (!parts) {
        sum_flat(flat.phases[0], source, own, bias, finish);
        continue;
      }
      for (int64_t phase = 0; phase < phases; ++phase) {
        accumulate_t* part = parts->get() + phase * flat.output_room;
        sum_flat(flat.phases[phase], source, own, bias,
                 [&](int64_t pixel, auto sums) FASTSEG_ALWAYS_INLINE { simd::store(part + pixel, sums); });
      }
      join_phases(map, flat, parts->get(), parts->get() + phases * flat.output_room, finish);
    }
  });
}

// lanes [R S] += the products of one plane.
template <typename scalar_t, typename vector_t>
void add_flat_products(const FlatPhase& phase, const simd::accumulate<scalar_t>* source, const scalar_t* grad,
                       vector_t* lanes) {
  int begin = 0;
  for (size_t index = 0; index < phase.ends.size(); ++index) {
    for (int first = 0; first < kGroupVectors; first += kSums) {
      const int64_t pixel = static_cast<int64_t>(index) * kGroup + first * kLanes;
      vector_t values[kSums];
      FASTSEG_UNROLL
      for (int v = 0; v < kSums; ++v) values[v] = simd::load(grad + pixel + v * kLanes);
      for (int t = begin; t < phase.ends[index]; ++t) {
        const FlatTap& tap = phase.taps[t];
        const auto* from = source + pixel + tap.shift;
        vector_t sum{};
        FASTSEG_UNROLL
        for (int v = 0; v < kSums; ++v) {
          const vector_t more = sum + values[v] * simd::load(from + v * kLanes);
          sum = simd::select_bits(tap.inside[first + v], more, sum);
        }
        lanes[tap.index] += sum;
      }
    }
    begin = phase.ends[index];
  }
}

template <typename scalar_t>
std::vector<double> sum_weights_of_planes(const Map& map, const scalar_t* input, const scalar_t* grad_output) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  if (Wide::fits(map)) return sum_weights_of_rows<WideProducts>(map, input, grad_output);
  if (!Flat::fits(map) || map.channels < 2 * slice_count(INT64_MAX)) {
    return sum_weights_of_rows<RowProducts>(map, input, grad_output);
  }
  const Flat flat(map);
  const Columns columns(map.columns, /*each_once=*/true, INT64_MAX);
  const int64_t height = map.rows.output, pixels = height * map.columns.output, taps = map.taps();
  const int64_t planes = map.images * map.channels;
  std::vector<double> sums(map.channels * taps);
  const UnevenSlices slices(map.channels, ceil_divide(map.smallest_slice(1), height * map.images));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    RowProducts<scalar_t> rows(map, columns, input, grad_output);
    FlatSource<scalar_t> sources(map, flat, input);
    const Scratch<vector_t> lanes(taps);
    std::fill_n(lanes.get(), taps, vector_t{});
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t image = 0; image < map.images; ++image) {
        const int64_t plane = image * map.channels + channel;
        const bool grad_ends = (planes - plane - 1) * pixels < kGroup;  // a load of the last group could leave it
        const auto* source = grad_ends ? nullptr : sources.plane(plane);
        if (source != nullptr) {
          add_flat_products(flat.phases[0], source, grad_output + plane * pixels, lanes.get());
        } else {
          for (int64_t y = 0; y < height; ++y) rows.add(plane, y, lanes.get());
        }
        rows.flush(lanes.get(), taps, sums.data() + channel * taps);
      }
    }
  });
  return sums;
}

}  // namespace fastseg::depthwise
