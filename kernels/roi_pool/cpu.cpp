// roi_pool on the CPU and its gradient: see README.md. Maps and groups of boxes are those of kernels/roi_align.
#include <limits>

#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "roi_align/bands.h"
#include "roi_align/boxes.h"
#include "roi_align/lanes.h"
#include "roi_pool/bins.h"

namespace fastseg::roi {
namespace {

struct Cells {
  int64_t first, end;
};

struct PoolBox {
  int level;
  int64_t image;
  std::vector<Cells> rows, columns;  // of each bin; empty if the box is not finite
  Window window;
};

template <typename value_t>
std::vector<PoolBox> make_pool_boxes(const value_t* values, int64_t count, Size size, value_t scale, int64_t bin_rows,
                                     int64_t bin_columns) {
  std::vector<PoolBox> boxes(count);
  for (int64_t k = 0; k < count; ++k) {
    const value_t* box = values + 5 * k;
    PoolBox& made = boxes[k];
    made = {0, static_cast<int64_t>(box[0]), std::vector<Cells>(bin_rows), std::vector<Cells>(bin_columns), {}};
    if (!is_box(box[1], box[2], box[3], box[4])) continue;
    const auto fill = [&](std::vector<Cells>& axis, value_t low, value_t high, int64_t extent) {
      const auto bins = make_bins(low, high, scale, static_cast<int>(axis.size()), static_cast<int>(extent));
      Cells all{extent, 0};
      for (size_t p = 0; p < axis.size(); ++p) {
        axis[p] = {bins.first(static_cast<int>(p)), bins.end(static_cast<int>(p))};
        if (axis[p].first >= axis[p].end) continue;
        all = {std::min(all.first, axis[p].first), std::max(all.end, axis[p].end)};
      }
      return all;
    };
    const Cells down = fill(made.rows, box[2], box[4], size.height);
    const Cells right = fill(made.columns, box[1], box[3], size.width);
    made.window = {down.first, right.first, down.end, right.end};
    if (made.window.empty()) made.window = {};
  }
  return boxes;
}

// --- forward ---

template <typename Lanes>
using Places = std::conditional_t<Lanes::kChannels == 1, int32_t, simd::mask<typename Lanes::value_t>>;

template <typename chosen_t>
FASTSEG_INLINE chosen_t choose(bool taken, chosen_t value, chosen_t other) {
  return taken ? value : other;
}
template <typename mask_t, typename chosen_t>
FASTSEG_INLINE chosen_t choose(mask_t taken, chosen_t value, chosen_t other) {
  return simd::select(taken, value, other);
}

template <typename Lanes>
FASTSEG_INLINE Places<Lanes> splat_place(int64_t place) {
  if constexpr (Lanes::kChannels == 1) return static_cast<int32_t>(place);
  else return Places<Lanes>{} + static_cast<simd::lane_of<Places<Lanes>>>(place);
}

template <typename Lanes>
FASTSEG_INLINE auto as_int32(Places<Lanes> places) {
  if constexpr (Lanes::kChannels == 1) return places;
  else return simd::convert<simd::i32x16>(places);
}

// The last NaN, else the first maximum, of every bin of a box and its place in a plane of `width` columns.
template <typename Lanes, typename scalar_t>
void pool_box(const Lanes& lanes, const Block<const scalar_t>& cells, const Window& window, const PoolBox& box,
              int64_t width, const Block<scalar_t>& output, const Block<int32_t>& argmax) {
  using value_t = typename Lanes::value_t;
  for (size_t py = 0; py < box.rows.size(); ++py) {
    for (size_t px = 0; px < box.columns.size(); ++px) {
      const Cells row = box.rows[py], column = box.columns[px];
      const bool any = row.first < row.end && column.first < column.end;
      auto best = lanes.splat(any ? -std::numeric_limits<value_t>::infinity() : value_t(0));
      auto place = splat_place<Lanes>(any ? row.first * width + column.first : -1);
      for (int64_t y = row.first; y < row.end; ++y) {
        for (int64_t x = column.first; x < column.end; ++x) {
          const auto value = lanes.load(cells.at(y - window.top, x - window.left));
          const auto taken = (value > best) | (value != value);
          best = choose(taken, value, best);
          place = choose(taken, splat_place<Lanes>(y * width + x), place);
        }
      }
      lanes.store(output.at(py, px), best);
      lanes.store(argmax.at(py, px), as_int32<Lanes>(place));
    }
  }
}

template <typename scalar_t>
void forward_of(const Map<const scalar_t>& map, int64_t images, const Tensor& boxes, double scale,
                const Map<scalar_t>& output, const Map<int32_t>& argmax) {
  using value_t = simd::accumulate<scalar_t>;
  const value_t* values = boxes_of<value_t>("roi_pool", boxes, images);
  const auto made = make_pool_boxes(values, boxes.size(0), {map.height, map.width}, static_cast<value_t>(scale),
                                    output.height, output.width);
  const bool copied = !map.interleaved && map.channels >= kFewChannels;
  const auto copies_once = [&](const Group& group, int64_t cells) { return copied && cells > group.window.area(); };
  const std::vector<Group> groups = split_groups(groups_of(made, 1, images), made, copies_once);
  const int64_t block = kLanes, blocks = ceil_divide(map.channels, block);
  const Window bins{0, 0, output.height, output.width};
  share_slices(static_cast<int64_t>(groups.size()) * blocks, [&](const auto& take) {
    std::vector<scalar_t> cell_buffer, bin_buffer;
    std::vector<int32_t> place_buffer;
    for (int64_t item = take(); item >= 0; item = take()) {
      const Group& group = groups[item / blocks];
      const int64_t first = item % blocks * block, end = std::min(first + block, map.channels);
      for_channels<value_t>(first, end, map.channels, [&](const auto& lanes, int64_t channel) {
        const auto cells = read_block(map, lanes, group.image, channel, group.window, cell_buffer);
        for (const int64_t k : group.boxes) {
          const auto to = block_to_write(output, lanes, k, channel, bins, bin_buffer);
          const auto places = block_to_write(argmax, lanes, k, channel, bins, place_buffer);
          pool_box(lanes, cells, group.window, made[k], map.width, to, places);
          write_block(output, lanes, k, channel, bins, bin_buffer, to);
          write_block(argmax, lanes, k, channel, bins, place_buffer, places);
        }
      });
    }
  });
}

// --- backward ---

template <typename scalar_t>
void backward_of(const Map<const scalar_t>& grad_output, const Map<const int32_t>& argmax, int64_t images,
                 const Tensor& boxes, double scale, const Map<scalar_t>& map) {
  using value_t = simd::accumulate<scalar_t>;
  const value_t* values = boxes_of<value_t>("roi_pool", boxes, images);
  const auto made = make_pool_boxes(values, boxes.size(0), {map.height, map.width}, static_cast<value_t>(scale),
                                    grad_output.height, grad_output.width);
  const std::vector<Group> groups = groups_of(made, 1, images);
  const int64_t block = kLanes, blocks = ceil_divide(map.channels, block), bins = grad_output.pixels();
  const std::vector<Band> bands = bands_of(groups, std::vector<Map<scalar_t>>{map}, block);
  share_slices(static_cast<int64_t>(bands.size()) * blocks, [&](const auto& take) {
    std::vector<value_t> cells;
    std::vector<scalar_t> buffer;
    for (int64_t item = take(); item >= 0; item = take()) {
      const Band& band = bands[item / blocks];
      const Window window{band.top, 0, band.bottom, map.width};
      const int64_t first = item % blocks * block, end = std::min(first + block, map.channels);
      for_channels<value_t>(first, end, map.channels, [&](const auto& lanes, int64_t channel) {
        constexpr int kChannels = std::decay_t<decltype(lanes)>::kChannels;
        cells.assign(window.area() * kChannels, value_t(0));
        for (const int64_t k : band.group->boxes) {
          if (made[k].window.bottom <= band.top || made[k].window.top >= band.bottom) continue;
          for (int64_t bin = 0; bin < bins; ++bin) {
            for (int c = 0; c < lanes.count(); ++c) {
              const int64_t place = *argmax.at(k, channel + c, bin) - band.top * map.width;
              if (place < 0 || place >= window.area()) continue;
              cells[place * kChannels + c] += static_cast<value_t>(*grad_output.at(k, channel + c, bin));
            }
          }
        }
        round_cells(lanes, cells, map, band.group->image, channel, window, buffer);
      });
    }
  });
}

// --- entry points ---

void check_pooled(const Tensor& output, const Tensor& argmax, const Tensor& boxes, const Tensor& input) {
  FASTSEG_CHECK(output.dim() == 4 && argmax.dim() == 4 && input.dim() == 4 && boxes.dim() == 2 &&
                    output.size(0) == boxes.size(0) && output.size(1) == input.size(1),
                "fastseg.ops.roi_pool: tensors do not fit");
  for (int dim = 0; dim < 4; ++dim) {
    FASTSEG_CHECK(argmax.size(dim) == output.size(dim), "fastseg.ops.roi_pool: argmax must have the size of output");
  }
  FASTSEG_CHECK(argmax.scalar_type() == ScalarType::Int, "fastseg.ops.roi_pool: argmax must be int32");
  FASTSEG_CHECK(input.size(2) * input.size(3) <= INT32_MAX, "fastseg.ops.roi_pool: a plane is too large");
}

template <typename places_t>
Map<places_t> argmax_map(const Tensor& tensor, places_t* data) {
  const bool interleaved = is_interleaved(tensor, "argmax");
  return {data, tensor.size(1), tensor.size(2), tensor.size(3), interleaved};
}

void forward(const Tensor& input, const Tensor& boxes, std::vector<int64_t> /*output_size*/, double spatial_scale,
             bool /*channels_last*/, const Tensor& output, const Tensor& argmax) {
  check_pooled(output, argmax, boxes, input);
  if (output.numel() == 0) return;
  use_huge_pages(output);
  use_huge_pages(argmax);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    forward_of(map_of<scalar_t>(input, "input"), input.size(0), boxes, spatial_scale,
               output_map<scalar_t>(output, "output"), argmax_map(argmax, argmax.mutable_data_ptr<int32_t>()));
  });
}

void backward(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes, std::vector<int64_t> /*size*/,
              double spatial_scale, bool /*channels_last*/, const Tensor& grad_input) {
  check_pooled(grad_output, argmax, boxes, grad_input);
  if (grad_input.numel() == 0) return;
  use_huge_pages(grad_input);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    backward_of(map_of<scalar_t>(grad_output, "grad_output"), argmax_map(argmax, argmax.const_data_ptr<int32_t>()),
                grad_input.size(0), boxes, spatial_scale, output_map<scalar_t>(grad_input, "grad_input"));
  });
}

}  // namespace
}  // namespace fastseg::roi

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_roi_pool", TORCH_BOX(&fastseg::roi::forward));
  m.impl("_roi_pool_backward", TORCH_BOX(&fastseg::roi::backward));
}
