// Between pooled elements and the pixels their int64 indices point at, where nothing is known of the indices:
// `scatter` goes one way, `gather` the other.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "max_pool2d/spread.h"
#include "max_pool2d/windows.h"

namespace fastseg::pooling {

// The first index found outside the plane, if any: an exception must not leave a parallel region.
class Outside {
 public:
  void found(int64_t index) {
    index_.store(index, std::memory_order_relaxed);
    found_.store(true, std::memory_order_release);
  }
  void check(int64_t height, int64_t width) const {
    if (!found_.load(std::memory_order_acquire)) return;
    throw std::runtime_error("fastseg.ops.max_unpool2d: indices holds a position outside the plane, " +
                             std::to_string(index_.load(std::memory_order_relaxed)) + "; allowed: 0 to " +
                             std::to_string(height * width - 1) + " in a plane of " + std::to_string(height) + "x" +
                             std::to_string(width));
  }

 private:
  std::atomic<int64_t> index_{0};
  std::atomic<bool> found_{false};
};

// Calls body(state, image, first channel, end channel) for planes one after the other, or for images if their pixels are
// interleaved, or for parts of the channels of these if there are fewer images than threads. start() makes a thread's
// state. Neither way mixes planes.
template <typename Start, typename Body>
void for_each_block(const Planes& planes, const Start& start, const Body& body) {
  int64_t block = 1;
  if (planes.channels_last) {
    const int64_t parts = ceil_divide(torch::stable::get_num_threads(), std::max<int64_t>(1, planes.images));
    block = round_up(ceil_divide(planes.channels, parts));
  }
  const int64_t blocks = ceil_divide(planes.channels, block);
  const int64_t items = planes.images * blocks;
  parallel_slices(items, slice_count(items), [&](int64_t, int64_t begin, int64_t end) {
    auto state = start();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block;
      body(state, item / blocks, first, std::min(first + block, planes.channels));
    }
    simd::stream_fence();
  });
}

// Where channel `first` of image `number` begins, in planes of `plane` elements.
inline int64_t block_offset(const Planes& planes, int64_t number, int64_t first, int64_t plane) {
  return number * planes.channels * plane + (planes.channels_last ? first : first * plane);
}

// Calls body(i, c, place) for every index of a block: element i of the pooled plane, channel c of `width`. A place outside
// the plane is told to `outside` instead.
template <typename Body>
FASTSEG_INLINE void for_each_place(const int64_t* places, int64_t pooled_plane, int64_t step, int64_t width,
                                   int64_t plane, Outside& outside, const Body& body) {
  bool all_inside = true;
  int64_t wrong = 0;
  const auto visit = [&](int64_t i, int64_t c, int64_t place) {
    if (static_cast<uint64_t>(place) < static_cast<uint64_t>(plane)) {
      body(i, c, place);
    } else {
      all_inside = false;
      wrong = place;
    }
  };
  if (width == 1) {
    for (int64_t i = 0; i < pooled_plane; ++i) visit(i, 0, places[i * step]);
  } else {
    for (int64_t i = 0; i < pooled_plane; ++i) {
      for (int64_t c = 0; c < width; ++c) visit(i, c, places[i * step + c]);
    }
  }
  if (!all_inside) outside.found(wrong);
}

// image[indices[i]] = combination of every pooled[i] that goes there, 0 elsewhere. Tells `outside` of indices outside
// the plane, and passes them over.
template <typename combine_t, typename scalar_t>
void scatter(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Planes& planes,
             Outside& outside) {
  using compute_t = simd::accumulate<scalar_t>;
  // Sums of half types are rounded once; everything else is combined where it belongs.
  constexpr bool kInPlace = std::is_same_v<combine_t, Last> || std::is_same_v<scalar_t, compute_t>;
  using pixel_t = std::conditional_t<kInPlace, scalar_t, compute_t>;
  const scalar_t* values = pooled.const_data_ptr<scalar_t>();
  const int64_t* places = indices.const_data_ptr<int64_t>();
  scalar_t* pixels = image.mutable_data_ptr<scalar_t>();
  const int64_t pooled_plane = pooled.size(2) * pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  const auto start = [&] { return std::vector<pixel_t>(kInPlace ? 0 : plane * step); };
  for_each_block(planes, start, [&](std::vector<pixel_t>& sums, int64_t number, int64_t first, int64_t end) {
    const int64_t width = end - first, at = block_offset(planes, number, first, pooled_plane);
    scalar_t* result = pixels + block_offset(planes, number, first, plane);
    pixel_t* to;
    if constexpr (kInPlace) to = result;
    else to = sums.data();
    if (width == step) {
      std::fill(to, to + plane * step, pixel_t(0));
    } else {
      for (int64_t p = 0; p < plane; ++p) std::fill(to + p * step, to + p * step + width, pixel_t(0));
    }
    for_each_place(places + at, pooled_plane, step, width, plane, outside, [&](int64_t i, int64_t c, int64_t place) {
      combine_t::combine(static_cast<pixel_t>(values[at + i * step + c]), &to[place * step + c]);
    });
    if constexpr (!kInPlace) {
      for (int64_t p = 0; p < plane; ++p) {
        for (int64_t c = 0; c < width; ++c) result[p * step + c] = static_cast<scalar_t>(to[p * step + c]);
      }
    }
  });
}

// pooled[i] = image[indices[i]]; tells `outside` of indices outside the plane.
template <typename scalar_t>
void gather(const Tensor& image, const Tensor& indices, const Tensor& pooled, const Planes& planes,
            Outside& outside) {
  const scalar_t* pixels = image.const_data_ptr<scalar_t>();
  const int64_t* places = indices.const_data_ptr<int64_t>();
  scalar_t* values = pooled.mutable_data_ptr<scalar_t>();
  const int64_t pooled_plane = pooled.size(2) * pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  for_each_block(planes, [] { return 0; }, [&](int, int64_t number, int64_t first, int64_t end) {
    const int64_t at = block_offset(planes, number, first, pooled_plane);
    const scalar_t* from = pixels + block_offset(planes, number, first, plane);
    for_each_place(places + at, pooled_plane, step, end - first, plane, outside,
                   [&](int64_t i, int64_t c, int64_t place) { values[at + i * step + c] = from[place * step + c]; });
  });
}

}  // namespace fastseg::pooling
