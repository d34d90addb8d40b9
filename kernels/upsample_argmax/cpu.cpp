// Bilinear upsampling fused with argmax over the classes (and the maximum softmax probability): no upsampled logits.
// README.md derives the method and proves that the pruned classes are never the largest.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "fastseg/check.h"
#include "fastseg/huge_pages.h"
#include "fastseg/parallel.h"
#include "fastseg/tile_argmax.h"
#include "upsample_argmax/labeller.h"

namespace fastseg::upsample_argmax {
namespace {

using torch::stable::Tensor;

constexpr int64_t kStreamedBytes = 8 << 20;   // label maps from here on bypass the cache
constexpr int64_t kFewestElements = 1 << 16;  // upsampled logits; with fewer a second thread costs more than it saves
constexpr int64_t kSmallestPrunedCell = 6;    // output pixels per source cell from which pruning pays

void run(const Problem& problem) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = problem.bands.size(), tiles = problem.tiles.size();
  // Slices of bands, so that every thread finds work even where one part of the image is pruned and another is not.
  const int64_t wanted_slices = ceil_divide(8 * threads, std::max<int64_t>(1, problem.images * tiles));
  const int64_t slices = std::clamp<int64_t>(wanted_slices, 1, std::max<int64_t>(1, bands / 4));
  const int64_t items = problem.images * tiles * slices;
  if (items == 0) return;
  const auto work = [&](const auto& take) {
    Labeller labeller(problem);
    for (int64_t item = take(); item >= 0; item = take()) {
      const int64_t slice = item % slices, tile = item / slices % tiles, image = item / slices / tiles;
      labeller.label(image, problem.tiles[tile], bands * slice / slices, bands * (slice + 1) / slices);
    }
    simd::stream_fence();
  };
  if (problem.images * problem.classes * problem.out_height * problem.out_width < kFewestElements) {
    int64_t next = 0;
    work([&] { return next < items ? next++ : -1; });
  } else {
    fastseg::share_slices(items, work);
  }
}

// The pixels of an image are one run in memory, its classes or its pixels next to each other.
bool is_flat(const Tensor& input) {
  return input.stride(2) == input.size(3) * input.stride(3) && (input.stride(3) == 1 || input.stride(1) == 1);
}

// What interpolation makes of a logit that it reads twice, with weights 1 and 0: NaN of an infinity.
struct Interpolated {
  template <typename vector_t>
  FASTSEG_INLINE vector_t operator()(vector_t logits) const {
    return logits + logits * 0.0f;
  }
};

// The labels [N, P] of logits [N, C, P] that keep their size.
template <typename scalar_t, typename label_t>
void label_pixels(PixelView<const scalar_t> logits, int64_t images, int64_t classes, int64_t pixels, label_t* labels) {
  const int tile = tile_pixels(classes);
  const UnevenSlices slices(images * ceil_divide(pixels, tile), ceil_divide(kFewestElements, tile * classes));
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    TileAccess<scalar_t> access(logits, {}, classes);
    Scratch<int32_t> found(tile);
    for_each_tile(begin, end, pixels, tile, [&](int64_t image, int64_t first, int count) {
      access.visit(image, first, count, [&](const fastseg::Tile<scalar_t>& rows) {
        tile_argmax(rows, classes, tile, found.get(), Interpolated());
      });
      std::copy_n(found.get(), count, labels + image * pixels + first);
    });
  });
}

// input: is_flat
template <typename label_t>
void label_pixels(const Tensor& input, label_t* labels) {
  const auto run = [&](const auto* data) {
    using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const PixelView<const scalar_t> logits{data, input.stride(0), input.stride(1), input.stride(3)};
    label_pixels(logits, input.size(0), input.size(1), input.size(2) * input.size(3), labels);
  };
  switch (input.scalar_type()) {
    case ScalarType::Half: return run(input.const_data_ptr<simd::Half>());
    case ScalarType::BFloat16: return run(input.const_data_ptr<simd::BFloat16>());
    default: return run(input.const_data_ptr<float>());
  }
}

// Sets everything except the outputs.
Problem describe(const Tensor& input, const std::vector<int64_t>& size,
                 const std::optional<std::vector<double>>& scales, bool align_corners) {
  Problem problem{};
  problem.input = input.const_data_ptr();
  problem.dtype = input.scalar_type();
  problem.images = input.size(0);
  problem.classes = input.size(1);
  problem.image_stride = input.stride(0);
  problem.class_stride = input.stride(1);
  problem.row_stride = input.stride(2);
  problem.column_stride = input.stride(3);
  problem.out_height = size[0];
  problem.out_width = size[1];
  const BilinearAxis rows(input.size(2), size[0], align_corners, scales.has_value() ? scales->at(0) : 0.0);
  const BilinearAxis columns(input.size(3), size[1], align_corners, scales.has_value() ? scales->at(1) : 0.0);
  problem.row_fraction.resize(size[0]);
  for (int64_t y = 0; y < size[0]; ++y) problem.row_fraction[y] = sample(rows, y).fraction;
  problem.bands = find_bands(rows);
  problem.blocks = find_blocks(columns);
  problem.tiles = find_tiles(problem.blocks, problem.classes);
  int64_t most_columns = 0, most_cells = 0;
  for (const Tile& tile : problem.tiles) most_columns = std::max(most_columns, tile.columns);
  for (const Block& block : problem.blocks) most_cells = std::max(most_cells, block.cells);
  problem.pitch = ceil_divide(most_columns, kLanes) * kLanes + kLanes;
  problem.prune = most_cells <= kLanes && size[0] * size[1] >= kSmallestPrunedCell * input.size(2) * input.size(3);
  return problem;
}

void check(const Tensor& input, const std::vector<int64_t>& size, const std::optional<std::vector<double>>& scales,
           const Tensor& labels) {
  FASTSEG_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0,
                "upsample_argmax: input must be [N, C, h, w] with classes and pixels");
  FASTSEG_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, "upsample_argmax: size must be two positive numbers");
  FASTSEG_CHECK(!scales.has_value() || scales->size() == 2, "upsample_argmax: scales must be two numbers");
  const int64_t longest = std::max({input.size(1), input.size(2), input.size(3), size[0], size[1]});
  FASTSEG_CHECK(longest < (int64_t{1} << 30), "upsample_argmax: a dimension is 2^30 or longer");
  const bool bytes = labels.scalar_type() == ScalarType::Byte && input.size(1) <= 256;
  FASTSEG_CHECK(bytes || labels.scalar_type() == ScalarType::Long,
                "upsample_argmax: dtype must be int64, or uint8 for C <= 256");
  FASTSEG_CHECK(labels.is_cpu() && labels.is_contiguous() && labels.numel() == input.size(0) * size[0] * size[1],
                "upsample_argmax: labels must be contiguous, [N, H, W]");
}

Problem labels_problem(const Tensor& input, const std::vector<int64_t>& size,
                       const std::optional<std::vector<double>>& scales, bool align_corners, const Tensor& labels) {
  Problem problem = describe(input, size, scales, align_corners);
  if (labels.scalar_type() == ScalarType::Byte) {
    problem.byte_labels = labels.mutable_data_ptr<uint8_t>();
  } else {
    problem.long_labels = labels.mutable_data_ptr<int64_t>();
  }
  problem.stream = labels.numel() * labels.element_size() >= kStreamedBytes;
  return problem;
}

void labels_only(const Tensor& input, std::vector<int64_t> size, std::optional<std::vector<double>> scales,
                 bool align_corners, ScalarType, const Tensor& labels) {
  check(input, size, scales, labels);
  use_huge_pages(labels);
  if (size[0] != input.size(2) || size[1] != input.size(3) || !is_flat(input)) {
    run(labels_problem(input, size, scales, align_corners, labels));
  } else if (labels.scalar_type() == ScalarType::Byte) {
    label_pixels(input, labels.mutable_data_ptr<uint8_t>());
  } else {
    label_pixels(input, labels.mutable_data_ptr<int64_t>());
  }
}

void labels_and_probability(const Tensor& input, std::vector<int64_t> size, std::optional<std::vector<double>> scales,
                            bool align_corners, ScalarType, const Tensor& labels, const Tensor& probability) {
  check(input, size, scales, labels);
  Problem problem = labels_problem(input, size, scales, align_corners, labels);
  FASTSEG_CHECK(probability.is_cpu() && probability.is_contiguous() && probability.numel() == labels.numel() &&
                    probability.scalar_type() == ScalarType::Float,
                "upsample_argmax: probability must be float32, contiguous, [N, H, W]");
  use_huge_pages(labels);
  use_huge_pages(probability);
  problem.probability = probability.mutable_data_ptr<float>();
  problem.prune = false;
  run(problem);
}

}  // namespace
}  // namespace fastseg::upsample_argmax

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_upsample_argmax", TORCH_BOX(&fastseg::upsample_argmax::labels_only));
  m.impl("_upsample_argmax_probability", TORCH_BOX(&fastseg::upsample_argmax::labels_and_probability));
}
