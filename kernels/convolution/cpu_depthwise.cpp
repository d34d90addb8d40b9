// The depthwise maps on the CPU: convolution, transposed convolution and the gradient of their weight. Formulas and
// measurements: README.md.
#include <torch/csrc/stable/library.h>

#include "convolution/depthwise_pixels.h"
#include "convolution/depthwise_rows.h"
#include "fastseg/huge_pages.h"

namespace fastseg::depthwise {
namespace {

// --- NCHW planes of equal width, without strides: lanes are 16 neighbours of a plane, whatever rows they lie in ---
//
// Every tap is a shift of the whole plane then. Rows end anywhere in a vector: which lanes have a tap inside is the
// same in all planes, and found once.

constexpr int kGroup = 64;  // neighbours handled at a time, a bit each

struct FlatTap {
  int64_t index;  // in the kernel
  int64_t shift;  // of the plane
  uint64_t inside;
};

struct Group {
  int full, end;  // taps [begin of this group, full) are inside for all lanes, [full, end) for some
};

struct Flat {
  std::vector<FlatTap> taps;  // of one group after the other
  std::vector<Group> groups;

  static bool fits(const Map& map) {
    constexpr int64_t kWidest = 128;  // whole vectors fill longer rows well
    return map.columns.source_step * map.columns.output_step * map.rows.source_step * map.rows.output_step == 1 &&
           map.columns.source == map.columns.output && map.columns.output <= kWidest &&
           map.images * map.channels >= std::max<int64_t>(8, 2 * slice_count(INT64_MAX));
  }

  explicit Flat(const Map& map) {
    const int64_t width = map.columns.output, pixels = map.rows.output * width;
    const size_t words = ceil_divide(pixels, kGroup);
    std::vector<std::vector<uint64_t>> bits;  // of every tap, one for each pixel
    std::vector<FlatTap> all;
    for (const Tap& row : map.rows.phases[0].taps) {
      for (const Tap& column : map.columns.phases[0].taps) {
        all.push_back({row.index * map.columns.kernel + column.index, row.offset * width + column.offset, 0});
        bits.emplace_back(words);
        for (int64_t y = row.first; y < row.end; ++y) {
          set_bits(bits.back(), y * width + column.first, y * width + column.end);
        }
      }
    }
    for (size_t word = 0; word < words; ++word) {
      Group group{0, 0};
      for (const bool full : {true, false}) {
        for (size_t tap = 0; tap < all.size(); ++tap) {
          const uint64_t inside = bits[tap][word];
          if (inside != 0 && (inside == ~uint64_t{0}) == full) taps.push_back({all[tap].index, all[tap].shift, inside});
        }
        (full ? group.full : group.end) = static_cast<int>(taps.size());
      }
      groups.push_back(group);
    }
  }

  // Whether a group of the plane may be read with any shift that has a lane inside.
  static bool is_safe(const Map& map, int64_t plane, int64_t pixels) {
    return plane * pixels >= kGroup && (map.images * map.channels - plane - 1) * pixels >= kGroup;
  }

 private:
  static void set_bits(std::vector<uint64_t>& words, int64_t first, int64_t end) {
    while (first < end) {
      const int64_t bit = first % kGroup, count = std::min(end - first, kGroup - bit);
      words[first / kGroup] |= (~uint64_t{0} >> (kGroup - count)) << bit;
      first += count;
    }
  }
};

// The lanes of the vector `v` of a group whose bits are set.
template <typename accumulate_t>
FASTSEG_INLINE simd::mask<accumulate_t> lanes_of_bits(uint64_t bits, int v) {
  using mask_t = simd::mask<accumulate_t>;
  using lane_t = simd::lane_of<mask_t>;
  alignas(64) static constexpr lane_t kBit[kLanes] = {1 << 0,  1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                                      1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                                      1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const mask_t own = mask_t{} + static_cast<lane_t>(bits >> (v * kLanes) & 0xffff);
  return (own & simd::load(kBit)) != mask_t{};
}

constexpr int kGroupVectors = kGroup / kLanes;
// Vectors whose sums stay in registers.
constexpr int kTogether = simd::kRegisterBytes >= 32 ? 4 : 2;

// One plane of outputs; beyond its end whole vectors are written if `spills`, to be overwritten by the next plane.
template <typename scalar_t>
void map_plane(const Flat& flat, int64_t pixels, const scalar_t* source, const simd::accumulate<scalar_t>* weights,
               const Epilogue<scalar_t>& epilogue, simd::accumulate<scalar_t> bias, const scalar_t* residual,
               scalar_t* to, bool spills) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vector_t = simd::vec<accumulate_t>;
  int begin = 0;
  for (size_t index = 0; index < flat.groups.size(); ++index) {
    const Group& group = flat.groups[index];
    for (int first = 0; first < kGroupVectors; first += kTogether) {
      const int64_t pixel = static_cast<int64_t>(index) * kGroup + first * kLanes;
      vector_t sums[kTogether];
      FASTSEG_UNROLL
      for (int v = 0; v < kTogether; ++v) sums[v] = vector_t{} + bias;
      for (int t = begin; t < group.full; ++t) {
        const scalar_t* from = source + pixel + flat.taps[t].shift;
        const accumulate_t weight = weights[flat.taps[t].index];
        FASTSEG_UNROLL
        for (int v = 0; v < kTogether; ++v) sums[v] += simd::load(from + v * kLanes) * weight;
      }
      for (int t = group.full; t < group.end; ++t) {
        const scalar_t* from = source + pixel + flat.taps[t].shift;
        const accumulate_t weight = weights[flat.taps[t].index];
        FASTSEG_UNROLL
        for (int v = 0; v < kTogether; ++v) {
          const auto inside = lanes_of_bits<accumulate_t>(flat.taps[t].inside, first + v);
          sums[v] = simd::select(inside, sums[v] + simd::load(from + v * kLanes) * weight, sums[v]);
        }
      }
      FASTSEG_UNROLL
      for (int v = 0; v < kTogether; ++v) {
        const int64_t at = pixel + v * kLanes;
        if (at >= pixels) break;
        const int count = static_cast<int>(std::min<int64_t>(kLanes, pixels - at));
        if (residual) {
          const int64_t step = epilogue.residual.column;
          sums[v] += load_strided(residual + at * step, step, count);
        }
        store_first(to + at, epilogue.rectified(sums[v]), spills ? kLanes : count);
      }
    }
    begin = group.end;
  }
}

template <typename scalar_t>
void map_planes(const Map& map, const scalar_t* input, const std::vector<simd::accumulate<scalar_t>>& weights,
                const Epilogue<scalar_t>& epilogue, scalar_t* output) {
  const ImageView<scalar_t>& residual = epilogue.residual;
  const bool even = residual.data == nullptr || residual.row == residual.column * map.columns.output;
  if (!even || !Flat::fits(map)) return map_rows(map, input, weights, epilogue, output);
  const Flat flat(map);
  const Columns columns(map.columns, /*each_once=*/false, kRun);
  const int64_t height = map.rows.output, pixels = height * map.columns.output;
  const int64_t source_pixels = map.rows.source * map.columns.source;
  const UnevenSlices slices(map.images * map.channels, ceil_divide(map.smallest_slice(1), height));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    RowMap<scalar_t> rows(map, columns, input, weights, epilogue, output);
    for (int64_t plane = begin; plane < end; ++plane) {
      if (!Flat::is_safe(map, plane, std::min(pixels, source_pixels))) {
        rows.run(plane * height, (plane + 1) * height);
        continue;
      }
      const int64_t image = plane / map.channels, channel = plane % map.channels;
      map_plane(flat, pixels, input + plane * source_pixels, weights.data() + channel * map.taps(), epilogue,
                epilogue.bias_of(channel), residual.data ? residual.at(image, channel, 0, 0) : nullptr,
                output + plane * pixels, plane + 1 < end && pixels >= kLanes);
    }
  });
}

// lanes [R S] += the products of one plane.
template <typename scalar_t, typename vector_t>
void add_plane_products(const Flat& flat, const scalar_t* source, const scalar_t* grad, vector_t* lanes) {
  int begin = 0;
  for (size_t index = 0; index < flat.groups.size(); ++index) {
    const Group& group = flat.groups[index];
    for (int first = 0; first < kGroupVectors; first += kTogether) {
      const int64_t pixel = static_cast<int64_t>(index) * kGroup + first * kLanes;
      vector_t values[kTogether];
      FASTSEG_UNROLL
      for (int v = 0; v < kTogether; ++v) values[v] = simd::load(grad + pixel + v * kLanes);
      for (int t = begin; t < group.full; ++t) {
        const scalar_t* from = source + pixel + flat.taps[t].shift;
        vector_t sum{};
        FASTSEG_UNROLL
        for (int v = 0; v < kTogether; ++v) sum += values[v] * simd::load(from + v * kLanes);
        lanes[flat.taps[t].index] += sum;
      }
      for (int t = group.full; t < group.end; ++t) {
        const scalar_t* from = source + pixel + flat.taps[t].shift;
        vector_t sum{};
        FASTSEG_UNROLL
        for (int v = 0; v < kTogether; ++v) {
          const auto inside = lanes_of_bits<simd::accumulate<scalar_t>>(flat.taps[t].inside, first + v);
          sum = simd::select(inside, sum + values[v] * simd::load(from + v * kLanes), sum);
        }
        lanes[flat.taps[t].index] += sum;
      }
    }
    begin = group.end;
  }
}

template <typename scalar_t>
std::vector<double> sum_weights_of_planes(const Map& map, const scalar_t* input, const scalar_t* grad_output) {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  if (!Flat::fits(map) || map.channels < 2 * slice_count(INT64_MAX)) {
    return sum_weights_of_rows(map, input, grad_output);
  }
  const Flat flat(map);
  const Columns columns(map.columns, /*each_once=*/true, INT64_MAX);
  const int64_t height = map.rows.output, pixels = height * map.columns.output, taps = map.taps();
  const int64_t source_pixels = map.rows.source * map.columns.source;
  std::vector<double> sums(map.channels * taps);
  const UnevenSlices slices(map.channels, ceil_divide(map.smallest_slice(1), height * map.images));
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    RowProducts<scalar_t> rows(map, columns, input, grad_output);
    const Scratch<vector_t> lanes(taps);
    std::fill_n(lanes.get(), taps, vector_t{});
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t image = 0; image < map.images; ++image) {
        const int64_t plane = image * map.channels + channel;
        if (Flat::is_safe(map, plane, std::min(pixels, source_pixels))) {
          add_plane_products(flat, input + plane * source_pixels, grad_output + plane * pixels, lanes.get());
        } else {
          for (int64_t y = 0; y < height; ++y) rows.add(plane, y, lanes.get());
        }
        flush(lanes.get(), taps, sums.data() + channel * taps);
      }
    }
  });
  return sums;
}

using MakeAxis = decltype(&Axis::convolution);

Map map_of(const Tensor& input, const Tensor& output, const Pair& kernel_size, const Pair& stride, const Pair& padding,
           const Pair& dilation, int64_t groups, MakeAxis make_axis, const char* name) {
  FASTSEG_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                "kernel_size, stride, padding and dilation must be pairs");
  check_image(input, input.scalar_type(), "input");
  check_image(output, input.scalar_type(), name);
  FASTSEG_CHECK(output.size(0) == input.size(0) && output.size(1) == input.size(1) && groups == input.size(1), name,
                " must have the images and channels of input, a group each");
  const auto axis = [&](int64_t i) {
    return make_axis(kernel_size[i], input.size(2 + i), output.size(2 + i), stride[i], padding[i], dilation[i]);
  };
  return {input.size(0), input.size(1), axis(0), axis(1), check_formats(input, output, name)};
}

void run_map(MakeAxis make_axis, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, const Pair& stride, const Pair& padding, const Pair& dilation,
             int64_t groups, bool relu, const Tensor& output) {
  if (output.numel() == 0) return;
  FASTSEG_CHECK(weight.dim() == 4, "weight must be [C, 1, R, S]");
  const Pair kernel_size{weight.size(2), weight.size(3)};
  const Map map = map_of(input, output, kernel_size, stride, padding, dilation, groups, make_axis, "output");
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const Epilogue<scalar_t> epilogue(map, bias, residual, output, relu);
    const auto weights = gathered_weights<scalar_t>(weight, map, /*by_tap=*/map.channels_last);
    const auto run = map.channels_last ? &map_pixels<scalar_t> : &map_planes<scalar_t>;
    run(map, input.const_data_ptr<scalar_t>(), weights, epilogue, output.mutable_data_ptr<scalar_t>());
  });
}

void convolution(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                 Pair stride, Pair padding, Pair dilation, int64_t groups, Pair /*size*/, bool relu,
                 const Tensor& output) {
  run_map(&Axis::convolution, input, weight, bias, residual, stride, padding, dilation, groups, relu, output);
}

void transposed(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                Pair stride, Pair padding, Pair dilation, int64_t groups, Pair /*size*/, bool relu,
                const Tensor& output) {
  run_map(&Axis::transposed, input, weight, bias, residual, stride, padding, dilation, groups, relu, output);
}

void grad_weight(const Tensor& input, const Tensor& grad_output, Pair stride, Pair padding, Pair dilation,
                 int64_t groups, Pair kernel_size, bool /*channels_last*/, const Tensor& grad_weight) {
  const Map map = map_of(input, grad_output, kernel_size, stride, padding, dilation, groups, &Axis::convolution,
                         "grad_output");
  check_image(grad_weight, input.scalar_type(), "grad_weight");
  FASTSEG_CHECK(grad_weight.size(0) == map.channels && grad_weight.size(1) == 1 &&
                    grad_weight.size(2) == map.rows.kernel && grad_weight.size(3) == map.columns.kernel,
                "grad_weight must be [C, 1, R, S]");
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto run = map.channels_last ? &sum_weights_of_pixels<scalar_t> : &sum_weights_of_planes<scalar_t>;
    const std::vector<double> sums = run(map, input.const_data_ptr<scalar_t>(), grad_output.const_data_ptr<scalar_t>());
    const int64_t channel_stride = map.channels_last ? 1 : map.taps();
    const int64_t tap_stride = map.channels_last ? padded(map.channels) : 1;
    write_grad_weight<scalar_t>(sums.data(), channel_stride, tap_stride, map, grad_weight);
  });
}

}  // namespace
}  // namespace fastseg::depthwise

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_depthwise_dilated_conv2d", TORCH_BOX(&fastseg::depthwise::convolution));
  m.impl("_depthwise_conv_transpose2d", TORCH_BOX(&fastseg::depthwise::transposed));
  m.impl("_depthwise_conv2d_grad_weight", TORCH_BOX(&fastseg::depthwise::grad_weight));
}
