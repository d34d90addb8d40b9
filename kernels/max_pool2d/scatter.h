// Between pooled elements and the pixels their int64 indices point at, where nothing is known of the indices:
// `scatter` goes one way, `gather` the other.
#pragma once

#include <atomic>
#include <string>

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
    STD_TORCH_CHECK(!found_.load(std::memory_order_acquire),
                    "fastseg.ops.max_unpool2d: indices holds a position outside the plane, ",
                    index_.load(std::memory_order_relaxed), "; allowed: 0 to ", height * width - 1,
                    " in a plane of ", height, "x", width);
  }

 private:
  std::atomic<int64_t> index_{0};
  std::atomic<bool> found_{false};
};

// Channels of one image that one thread takes at a time. Neither way mixes them.
constexpr int64_t kChannelBlock = 16;

// Calls body(image, first channel, end channel) for planes of one slice after the other: blocks of channels if they are
// interleaved, else single ones. start() gives what a slice works with.
template <typename Start, typename Body>
void for_each_block(const Planes& planes, const Start& start, const Body& body) {
  const int64_t block = planes.channels_last ? kChannelBlock : 1;
  const int64_t blocks = ceil_divide(planes.channels, block);
  const int64_t items = planes.images * blocks;
  parallel_slices(items, slice_count(items), [&](int64_t, int64_t begin, int64_t end) {
    auto own = start();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block;
      body(own, item / blocks, first, std::min(first + block, planes.channels));
    }
    simd::stream_fence();
  });
}

// Where channel `first` of image `number` begins, in planes of `plane` elements.
inline int64_t block_offset(const Planes& planes, int64_t number, int64_t first, int64_t plane) {
  return number * planes.channels * plane + (planes.channels_last ? first : first * plane);
}

// image[indices[i]] = combination of every pooled[i] that goes there, 0 elsewhere. Tells `outside` of indices outside
// the plane, and passes them over.
template <typename combine_t, typename scalar_t>
void scatter(const Tensor& pooled, const Tensor& indices, const Tensor& image, const Planes& planes,
             Outside& outside) {
  using compute_t = simd::accumulate<scalar_t>;
  struct Own {
    std::vector<compute_t> block;  // [plane, channels of the block]
    RowWriter<scalar_t> writer;
  };
  const scalar_t* values = pooled.const_data_ptr<scalar_t>();
  const int64_t* places = indices.const_data_ptr<int64_t>();
  scalar_t* pixels = image.mutable_data_ptr<scalar_t>();
  const int64_t pooled_plane = pooled.size(2) * pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  const int64_t most = round_up(plane * (planes.channels_last ? kChannelBlock : 1));
  const bool streamed = worth_streaming<scalar_t>(image.numel());
  const auto start = [&] { return Own{std::vector<compute_t>(most), RowWriter<scalar_t>(most, streamed)}; };
  for_each_block(planes, start, [&](Own& own, int64_t number, int64_t first, int64_t end) {
    const int64_t width = end - first, at = block_offset(planes, number, first, pooled_plane);
    compute_t* block = own.block.data();
    std::fill(block, block + plane * width, compute_t(0));
    for (int64_t i = 0; i < pooled_plane; ++i) {
      for (int64_t c = 0; c < width; ++c) {
        const int64_t place = places[at + i * step + c];
        if (static_cast<uint64_t>(place) < static_cast<uint64_t>(plane)) {
          combine_t::combine(static_cast<compute_t>(values[at + i * step + c]), &block[place * width + c]);
        } else {
          outside.found(place);
        }
      }
    }
    scalar_t* to = pixels + block_offset(planes, number, first, plane);
    if (!planes.channels_last) {
      own.writer.write(to, block, plane);
      return;
    }
    for (int64_t p = 0; p < plane; ++p) own.writer.write(to + p * step, block + p * width, width);
  });
}

// pooled[i] = image[indices[i]]; tells `outside` of indices outside the plane, and gives 0 there.
template <typename scalar_t>
void gather(const Tensor& image, const Tensor& indices, const Tensor& pooled, const Planes& planes,
            Outside& outside) {
  const scalar_t* pixels = image.const_data_ptr<scalar_t>();
  const int64_t* places = indices.const_data_ptr<int64_t>();
  scalar_t* values = pooled.mutable_data_ptr<scalar_t>();
  const int64_t pooled_plane = pooled.size(2) * pooled.size(3), plane = image.size(2) * image.size(3);
  const int64_t step = planes.channels_last ? planes.channels : 1;
  for_each_block(planes, [] { return 0; }, [&](int, int64_t number, int64_t first, int64_t end) {
    const int64_t width = end - first, at = block_offset(planes, number, first, pooled_plane);
    const scalar_t* from = pixels + block_offset(planes, number, first, plane);
    for (int64_t i = 0; i < pooled_plane; ++i) {
      for (int64_t c = 0; c < width; ++c) {
        const int64_t place = places[at + i * step + c];
        const bool inside = static_cast<uint64_t>(place) < static_cast<uint64_t>(plane);
        if (!inside) outside.found(place);
        values[at + i * step + c] = inside ? from[place * step + c] : scalar_t(0);
      }
    }
  });
}

}  // namespace fastseg::pooling
