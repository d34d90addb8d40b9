// Packing and unpacking of masks, 64 pixels or two words at a time. See README.md.
#include <array>
#include <cmath>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "fastseg/arguments.h"
#include "fastseg/huge_pages.h"
#include "fastseg/packed_masks.h"

namespace {

using fastseg::Box;
using fastseg::kWord;
using fastseg::MaskStatistics;
using fastseg::PackedMasks;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kGroup = 64;                   // pixels
constexpr int64_t kPrefetchDistance = 4096;  // bytes: the hardware prefetcher stops at the end of a page

// ---- which pixels of a group belong to the mask, as bits ----

// Bytes of `least` or more: those that are not 0, or above a threshold.
struct AtLeast {
  using pixel_t = uint8_t;
  uint8_t least;
  uint64_t allowed;  // bits that may be set: none if no byte can exceed the threshold

  FASTSEG_INLINE uint64_t operator()(const uint8_t* from) const { return bits(from) & allowed; }

  FASTSEG_INLINE uint64_t bits(const uint8_t* from) const {
#if defined(__AVX512BW__)
    return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(from), _mm512_set1_epi8(static_cast<char>(least)));
#elif defined(__AVX2__)
    const __m256i limit = _mm256_set1_epi8(static_cast<char>(least));
    uint64_t bits = 0;
    for (int i = 0; i < kGroup; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      const auto mask = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(bytes, limit), bytes));
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(mask)) << i;
    }
    return bits;
#elif defined(__SSE2__)
    const __m128i limit = _mm_set1_epi8(static_cast<char>(least));
    uint64_t bits = 0;
    for (int i = 0; i < kGroup; i += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      bits |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(bytes, limit), bytes))) << i;
    }
    return bits;
#else
    uint64_t bits = 0;
    for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint64_t>(from[i] >= least) << i;
    return bits;
#endif
  }
};

// Numbers above a threshold of their own type.
template <typename scalar_t>
struct Above {
  using pixel_t = scalar_t;
  simd::accumulate<scalar_t> threshold;

  FASTSEG_INLINE uint64_t operator()(const scalar_t* from) const {
    uint64_t bits = 0;
    for (int i = 0; i < kGroup; i += simd::kLanes) {
      const auto above = simd::load(from + i) > simd::splat(threshold);
      bits |= static_cast<uint64_t>(simd::mask_bits(above)) << i;
    }
    return bits;
  }
};

// Masks of any strides, except that the pixels of a row are contiguous.
template <typename pixel_t>
struct Pixels {
  const pixel_t* data;
  int64_t width, mask_stride, row_stride;
};

template <typename Test, typename pixel_t = typename Test::pixel_t>
void pack_row(const pixel_t* from, int64_t width, const Test& test, uint32_t* to) {
  int64_t x = 0;
  for (; x + kGroup <= width; x += kGroup, to += 2) {
    for (size_t byte = 0; byte < kGroup * sizeof(pixel_t); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(from + x) + kPrefetchDistance + byte);
    }
    const uint64_t bits = test(from + x);
    std::memcpy(to, &bits, sizeof bits);
  }
  const int64_t left = width - x;
  if (left == 0) return;
  alignas(64) pixel_t group[kGroup]{};
  std::memcpy(static_cast<void*>(group), from + x, sizeof(pixel_t) * left);
  const uint64_t bits = test(group) & ((uint64_t{1} << left) - 1);
  to[0] = static_cast<uint32_t>(bits);
  if (left > kWord) to[1] = static_cast<uint32_t>(bits >> kWord);
}

template <typename Test>
void pack(const Pixels<typename Test::pixel_t>& pixels, const Test& test, uint32_t* words, const PackedMasks& masks,
          int64_t* areas, Box* boxes) {
  fastseg::collect_statistics(masks, areas, boxes, [&](int64_t mask, int64_t first, int64_t rows) {
    fastseg::RowStatistics statistics(masks.pitch);
    for (int64_t y = first; y < first + rows; ++y) {
      uint32_t* to = words + (mask * masks.height + y) * masks.pitch;
      pack_row(pixels.data + mask * pixels.mask_stride + y * pixels.row_stride, pixels.width, test, to);
      statistics.add(to, y);
    }
    return statistics.found();
  });
}

// masks: [N, H, W] of any dtype and strides; words: [N, H, ceil(W / 32)]; area: [N]; boxes: [N, 4]
void pack_forward(const Tensor& masks, std::optional<double> threshold, const Tensor& words, const Tensor& area,
                  const Tensor& boxes) {
  constexpr const char* op = "_pack_masks";
  const PackedMasks packed = fastseg::packed_masks(words, op);
  fastseg::check_statistics(packed, area, boxes);
  FASTSEG_CHECK(masks.is_cpu() && masks.dim() == 3 && masks.size(0) == packed.count && masks.size(1) == packed.height &&
                    fastseg::ceil_divide(masks.size(2), kWord) == packed.pitch,
                "fastseg::_pack_masks: words do not have the size of masks");
  fastseg::use_huge_pages(words);
  const int64_t width = masks.size(2);
  const Tensor source = width <= 1 || masks.stride(2) == 1 ? masks : torch::stable::contiguous(masks);
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  auto* areas = area.mutable_data_ptr<int64_t>();
  auto* found = reinterpret_cast<Box*>(boxes.mutable_data_ptr<int32_t>());
  const auto run = [&](const auto& test) {
    using pixel_t = typename std::decay_t<decltype(test)>::pixel_t;
    const Pixels<pixel_t> pixels{static_cast<const pixel_t*>(source.const_data_ptr()), width, source.stride(0),
                                 source.stride(1)};
    pack(pixels, test, to, packed, areas, found);
  };
  const ScalarType type = source.scalar_type();
  if (type == ScalarType::Bool || type == ScalarType::Byte) {
    const double least = threshold ? std::floor(*threshold) + 1 : 1;
    return run(AtLeast{static_cast<uint8_t>(std::clamp(least, 0.0, 255.0)), least > 255 ? 0 : ~uint64_t{0}});
  }
  FASTSEG_CHECK(threshold.has_value(), "fastseg::_pack_masks: floating masks need a threshold");
  fastseg::with_floating_type(source, "fastseg::_pack_masks: masks", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto in_own_type = static_cast<scalar_t>(static_cast<simd::accumulate<scalar_t>>(*threshold));
    run(Above<scalar_t>{static_cast<simd::accumulate<scalar_t>>(in_own_type)});
  });
}

// ---- unpacking ----

// The eight bytes of eight bits.
const std::array<uint64_t, 256>& bytes_of_bits() {
  static const std::array<uint64_t, 256> table = [] {
    std::array<uint64_t, 256> made{};
    for (int bits = 0; bits < 256; ++bits) {
      for (int b = 0; b < 8; ++b) made[bits] |= static_cast<uint64_t>(bits >> b & 1) << 8 * b;
    }
    return made;
  }();
  return table;
}

void unpack_row(const uint32_t* from, int64_t width, uint8_t* to) {
  const auto& table = bytes_of_bits();
  int64_t x = 0;
  for (; x + kWord <= width; x += kWord) {
    const uint32_t bits = from[x / kWord];
    const uint64_t bytes[] = {table[bits & 255], table[bits >> 8 & 255], table[bits >> 16 & 255], table[bits >> 24]};
    std::memcpy(to + x, bytes, sizeof bytes);
  }
  for (; x < width; ++x) to[x] = from[x / kWord] >> x % kWord & 1;
}

template <typename scalar_t>
void unpack_row(const uint32_t* from, int64_t width, scalar_t* to) {
  const scalar_t values[] = {static_cast<scalar_t>(0.0f), static_cast<scalar_t>(1.0f)};
  for (int64_t first = 0; first < width; first += kWord) {
    const uint32_t bits = from[first / kWord];
    const int64_t count = std::min<int64_t>(kWord, width - first);
    for (int64_t x = 0; x < count; ++x) to[first + x] = values[bits >> x & 1];
  }
}

// words: [N, H, ceil(width / 32)]; output: [N, H, width]
void unpack_forward(const Tensor& words, int64_t width, ScalarType dtype, const Tensor& output) {
  const PackedMasks masks = fastseg::packed_masks(words, "_unpack_masks");
  FASTSEG_CHECK(output.is_cpu() && output.is_contiguous() && width >= 0 &&
                    fastseg::ceil_divide(width, kWord) == masks.pitch &&
                    output.numel() == masks.count * masks.height * width,
                "fastseg::_unpack_masks: masks must be contiguous [N, H, width] on the CPU");
  fastseg::use_huge_pages(output);
  const auto run = [&](auto* to) {
    const int64_t rows = masks.count * masks.height;
    const fastseg::UnevenSlices slices(rows, fastseg::ceil_divide(1 << 16, width + 1));
    slices.run([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) unpack_row(masks.words + row * masks.pitch, width, to + row * width);
    });
  };
  const ScalarType type = output.scalar_type();
  if (type == ScalarType::Bool || type == ScalarType::Byte) {
    return run(static_cast<uint8_t*>(output.mutable_data_ptr()));
  }
  fastseg::with_floating_type(output, "fastseg::_unpack_masks: masks",
                              [&](auto zero) { run(static_cast<decltype(zero)*>(output.mutable_data_ptr())); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_pack_masks", TORCH_BOX(&pack_forward));
  m.impl("_unpack_masks", TORCH_BOX(&unpack_forward));
}
