// roi_align on the CPU, over the levels of a pyramid, and its gradient. Formulas, reading order: README.md.
#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "roi_align/bands.h"
#include "roi_align/boxes.h"
#include "roi_align/lanes.h"

namespace fastseg::roi {
namespace {

// --- forward: a bin is the weighted sum of the cells in its rows and columns ---

template <typename Lanes, typename scalar_t, typename value_t>
void sum_cells(const Lanes& lanes, const Block<const scalar_t>& cells, const Window& window, const Box<value_t>& box,
               const Block<scalar_t>& bins) {
  for (int32_t py = 0; py < box.rows.end(); ++py) {
    for (int32_t px = 0; px < box.columns.end(); ++px) {
      typename Lanes::vector_t sums[Lanes::kWidth] = {};
      for (const Tap<value_t>* row = box.rows.begin_of(py); row < box.rows.end_of(py); ++row) {
        const scalar_t* line = cells.at(row->place - window.top, -window.left);
        for (const Tap<value_t>* column = box.columns.begin_of(px); column < box.columns.end_of(px); ++column) {
          const auto weight = lanes.splat(row->weight * column->weight);
          const scalar_t* cell = line + column->place * cells.pixel;
          FASTSEG_UNROLL
          for (int i = 0; i < Lanes::kWidth; ++i) sums[i] += weight * lanes.load(cell + i * Lanes::kStep);
        }
      }
      FASTSEG_UNROLL
      for (int i = 0; i < Lanes::kWidth; ++i) lanes.store(bins.at(py, px) + i * Lanes::kStep, sums[i]);
    }
  }
}

template <typename scalar_t>
void forward_of(const std::vector<Map<const scalar_t>>& maps, int64_t images, const Tensor& boxes,
                const Sampling& sampling, const Map<scalar_t>& output) {
  using value_t = simd::accumulate<scalar_t>;
  const value_t* values = boxes_of<value_t>("roi_align", boxes, images);
  std::vector<Size> sizes;
  for (const auto& map : maps) sizes.push_back({map.height, map.width});
  const std::vector<Box<value_t>> made = make_boxes(values, boxes.size(0), sizes, sampling, /*by_cell=*/false);
  const auto copies_once = [&](const Group& group, int64_t cells) {
    const bool copied = !maps[group.level].interleaved && output.channels >= kFewChannels;
    return copied && cells > group.window.area();
  };
  const std::vector<Group> groups = split_groups(groups_of(made, sampling.levels(), images), made, copies_once);
  const int64_t block = channel_block(output.channels, maps[0].interleaved);
  const int64_t blocks = ceil_divide(output.channels, block);
  const Window bins{0, 0, sampling.bin_rows, sampling.bin_columns};
  share_slices(static_cast<int64_t>(groups.size()) * blocks, [&](const auto& take) {
    std::vector<scalar_t> cell_buffer, bin_buffer;
    for (int64_t item = take(); item >= 0; item = take()) {
      const Group& group = groups[item / blocks];
      const int64_t first = item % blocks * block, end = std::min(first + block, output.channels);
      for_channels<value_t>(first, end, output.channels, [&](const auto& lanes, int64_t channel) {
        const auto cells = read_block(maps[group.level], lanes, group.image, channel, group.window, cell_buffer);
        for (const int64_t k : group.boxes) {
          const auto to = block_to_write(output, lanes, k, channel, bins, bin_buffer);
          sum_cells(lanes, cells, group.window, made[k], to);
          write_block(output, lanes, k, channel, bins, bin_buffer, to);
        }
      });
    }
  });
}

// --- backward: a cell is the weighted sum of the bins that read it, box by box ---

// Adds the gradient of a box to rows [top, bottom) of `width` cells. line: [bin columns][channels].
template <typename Lanes, typename scalar_t, typename value_t>
void add_bins(const Lanes& lanes, const Block<const scalar_t>& bins, const Box<value_t>& box, int64_t bin_columns,
              int64_t top, int64_t bottom, int64_t width, value_t* line, value_t* cells) {
  constexpr int kStep = Lanes::kStep, kWidth = Lanes::kWidth;
  using Full = std::conditional_t<Lanes::kChannels == 1, Lanes, Wide<value_t, kWidth>>;  // for `line` and `cells`
  const int64_t end = std::min<int64_t>(bottom, box.rows.end());
  for (int64_t y = std::max<int64_t>(top, box.rows.first); y < end; ++y) {
    const Tap<value_t>*row = box.rows.begin_of(y), *row_end = box.rows.end_of(y);
    if (row == row_end) continue;
    for (int64_t px = 0; px < bin_columns; ++px) {
      typename Lanes::vector_t sums[kWidth] = {};
      for (const Tap<value_t>* tap = row; tap < row_end; ++tap) {
        const auto weight = lanes.splat(tap->weight);
        const scalar_t* bin = bins.at(tap->place, px);
        FASTSEG_UNROLL
        for (int i = 0; i < kWidth; ++i) sums[i] += weight * lanes.load(bin + i * kStep);
      }
      FASTSEG_UNROLL
      for (int i = 0; i < kWidth; ++i) Full::store(line + (px * kWidth + i) * kStep, sums[i]);
    }
    for (int32_t x = box.columns.first; x < box.columns.end(); ++x) {
      const Tap<value_t>*column = box.columns.begin_of(x), *column_end = box.columns.end_of(x);
      if (column == column_end) continue;
      value_t* cell = cells + ((y - top) * width + x) * Lanes::kChannels;
      typename Lanes::vector_t sums[kWidth];
      FASTSEG_UNROLL
      for (int i = 0; i < kWidth; ++i) sums[i] = Full::load(cell + i * kStep);
      for (; column < column_end; ++column) {
        const auto weight = lanes.splat(column->weight);
        const value_t* from = line + column->place * Lanes::kChannels;
        FASTSEG_UNROLL
        for (int i = 0; i < kWidth; ++i) sums[i] += weight * Full::load(from + i * kStep);
      }
      FASTSEG_UNROLL
      for (int i = 0; i < kWidth; ++i) Full::store(cell + i * kStep, sums[i]);
    }
  }
}

template <typename scalar_t>
void backward_of(const Map<const scalar_t>& grad_output, int64_t images, const Tensor& boxes, const Sampling& sampling,
                 const std::vector<Map<scalar_t>>& maps) {
  using value_t = simd::accumulate<scalar_t>;
  const value_t* values = boxes_of<value_t>("roi_align", boxes, images);
  std::vector<Size> sizes;
  for (const auto& map : maps) sizes.push_back({map.height, map.width});
  const std::vector<Box<value_t>> made = make_boxes(values, boxes.size(0), sizes, sampling, /*by_cell=*/true);
  const std::vector<Group> groups = groups_of(made, sampling.levels(), images);
  const int64_t channels = grad_output.channels, block = channel_block(channels, maps[0].interleaved);
  const int64_t blocks = ceil_divide(channels, block);
  const std::vector<Band> bands = bands_of(groups, maps, channels < kFewChannels ? 1 : block);
  const Window bins{0, 0, sampling.bin_rows, sampling.bin_columns};
  share_slices(static_cast<int64_t>(bands.size()) * blocks, [&](const auto& take) {
    std::vector<scalar_t> bin_buffer, cell_buffer;
    std::vector<value_t> line, cells;
    for (int64_t item = take(); item >= 0; item = take()) {
      const Band& band = bands[item / blocks];
      const Group& group = *band.group;
      const Map<scalar_t>& map = maps[group.level];
      const Window window{band.top, 0, band.bottom, map.width};
      const int64_t first = item % blocks * block, end = std::min(first + block, channels);
      for_channels<value_t>(first, end, channels, [&](const auto& lanes, int64_t channel) {
        constexpr int kChannels = std::decay_t<decltype(lanes)>::kChannels;
        cells.assign(window.area() * kChannels, value_t(0));
        line.resize(sampling.bin_columns * kChannels);
        for (const int64_t k : group.boxes) {
          const Box<value_t>& box = made[k];
          if (box.window.bottom <= band.top || box.window.top >= band.bottom) continue;
          const auto from = read_block(grad_output, lanes, k, channel, bins, bin_buffer);
          add_bins(lanes, from, box, sampling.bin_columns, band.top, band.bottom, map.width, line.data(), cells.data());
        }
        round_cells(lanes, cells, map, group.image, channel, window, cell_buffer);
      });
    }
  });
}

// --- entry points ---

using Numbers = std::vector<double>;
using Sizes = std::vector<int64_t>;
using Level = std::optional<Tensor>;

Sampling sampling_of(const Tensor& pooled, const Numbers& scales, const Numbers& areas, int64_t ratio, bool aligned,
                     size_t levels) {
  FASTSEG_CHECK(levels >= 1 && scales.size() == levels && areas.size() + 1 == levels,
                "fastseg.ops.roi_align: levels, scales and areas must fit each other");
  return {scales, areas, ratio, aligned, pooled.size(2), pooled.size(3)};
}

// Maps of the first `levels` of the tensors, all of which have N images and C channels.
template <typename Found, typename Make>
std::vector<Found> pyramid(std::initializer_list<const Tensor*> tensors, size_t levels, int64_t images,
                           int64_t channels, const Make& make) {
  std::vector<Found> maps;
  for (const Tensor* tensor : tensors) {
    if (maps.size() == levels) break;
    FASTSEG_CHECK(tensor != nullptr, "fastseg.ops.roi_align: a level is missing");
    maps.push_back(make(*tensor));
    FASTSEG_CHECK(tensor->size(0) == images && maps.back().channels == channels && maps.back().pixels() > 0,
                  "fastseg.ops.roi_align: levels must have the same images and channels");
  }
  FASTSEG_CHECK(maps.size() == levels, "fastseg.ops.roi_align: too many levels");
  return maps;
}

void forward(const Tensor& input, Level input1, Level input2, Level input3, Level input4, const Tensor& boxes,
             Sizes /*output_size*/, Numbers spatial_scales, Numbers level_areas, int64_t sampling_ratio, bool aligned,
             bool /*channels_last*/, const Tensor& output) {
  FASTSEG_CHECK(output.dim() == 4 && input.dim() == 4 && boxes.dim() == 2 && output.size(0) == boxes.size(0),
                "fastseg.ops.roi_align: tensors do not fit");
  if (output.numel() == 0) return;
  const size_t levels = spatial_scales.size();
  const Sampling sampling = sampling_of(output, spatial_scales, level_areas, sampling_ratio, aligned, levels);
  const auto pointer = [](const Level& level) { return level ? &*level : nullptr; };
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto make = [](const Tensor& tensor) { return map_of<scalar_t>(tensor, "input"); };
    const auto maps =
        pyramid<Map<const scalar_t>>({&input, pointer(input1), pointer(input2), pointer(input3), pointer(input4)},
                                     levels, input.size(0), output.size(1), make);
    forward_of(maps, input.size(0), boxes, sampling, output_map<scalar_t>(output, "output"));
  });
}

void backward(const Tensor& grad_output, const Tensor& boxes, Sizes sizes, Numbers spatial_scales, Numbers level_areas,
              int64_t sampling_ratio, bool aligned, bool /*channels_last*/, const Tensor& grad_input,
              const Tensor& grad_input1, const Tensor& grad_input2, const Tensor& grad_input3,
              const Tensor& grad_input4) {
  FASTSEG_CHECK(
      grad_output.dim() == 4 && grad_input.dim() == 4 && boxes.dim() == 2 && grad_output.size(0) == boxes.size(0),
      "fastseg.ops.roi_align: tensors do not fit");
  if (grad_input.numel() == 0) return;
  const size_t levels = spatial_scales.size();
  const Sampling sampling = sampling_of(grad_output, spatial_scales, level_areas, sampling_ratio, aligned, levels);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto make = [](const Tensor& tensor) {
      use_huge_pages(tensor);
      return output_map<scalar_t>(tensor, "grad_input");
    };
    const auto maps = pyramid<Map<scalar_t>>({&grad_input, &grad_input1, &grad_input2, &grad_input3, &grad_input4},
                                             levels, grad_input.size(0), grad_output.size(1), make);
    backward_of(map_of<scalar_t>(grad_output, "grad_output"), grad_input.size(0), boxes, sampling, maps);
  });
}

}  // namespace
}  // namespace fastseg::roi

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_roi_align", TORCH_BOX(&fastseg::roi::forward));
  m.impl("_roi_align_backward", TORCH_BOX(&fastseg::roi::backward));
}
