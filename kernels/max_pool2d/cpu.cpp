// max_pool2d on the CPU: the maximum and its index, and the gradient. Formulas and measurements: README.md.
#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "max_pool2d/phases.h"
#include "max_pool2d/scatter.h"
#include "max_pool2d/spread.h"
#include "max_pool2d/windows.h"

namespace fastseg::pooling {
namespace {

// A tap of 16 neighbouring outputs: windows next to each other in a plane, or channels of one window.
template <typename value_t>
struct Tap {
  const value_t* values;
  int32_t label;
};

// One thread's part of the forward: taps in, rows of maxima and indices out.
template <typename scalar_t, typename index_t>
class Pool {
 public:
  using compute_t = simd::accumulate<scalar_t>;

  Pool(const Windows& windows, int64_t longest, bool stream_output, bool stream_indices)
      : windows_(windows),
        stream_indices_(stream_indices),
        best_(round_up(longest) + kLanes),
        labels_(round_up(longest) + kLanes),
        indices_(round_up(longest) + kLanes),
        writer_(longest, stream_output) {}

  // Maxima of `count` lanes from element `at` of the row on. first: labels [count] of all -inf windows, less `label`.
  template <typename value_t, typename Load>
  FASTSEG_INLINE void maximum(const std::vector<Tap<value_t>>& taps, int64_t at, int64_t count, const int32_t* first,
                              int32_t label, const Load& load) {
    for (int64_t i = 0; i < count; i += kLanes) {
      auto best = simd::splat(-std::numeric_limits<compute_t>::infinity());
      auto labels = splat_label<compute_t>(label);
      if (first != nullptr) labels = labels + load_labels<compute_t>(first + i);
      for (const Tap<value_t>& tap : taps) {
        const auto value = load(tap.values + i);
        const auto taken = (value > best) | (value != value);  // the last NaN, else the first maximum
        best = simd::select(taken, value, best);
        labels = simd::select(taken, splat_label<compute_t>(tap.label), labels);
      }
      simd::store(best_.data() + at + i, best);
      store_labels<compute_t>(labels_.data() + at + i, labels);
    }
  }

  // indices[at + i] of `count` outputs, of which output i is that of window ox + i * step in row oy.
  FASTSEG_INLINE void index(int64_t at, int64_t count, int64_t oy, int64_t ox, int64_t step) {
    const int64_t origin = windows_.label_origin(oy, ox);
    const int64_t stride = windows_.flat ? step * windows_.x.stride : 0;
    const int32_t* labels = labels_.data() + at;
    index_t* indices = indices_.data() + at;
    for (int64_t i = 0; i < count; ++i) indices[i] = static_cast<index_t>(origin + i * stride + labels[i]);
  }

  void write(scalar_t* output, index_t* indices, int64_t count) {
    writer_.write(output, best_.data(), count);
    write_row(indices, indices_.data(), count, stream_indices_);
  }

 private:
  const Windows& windows_;
  bool stream_indices_;
  std::vector<compute_t> best_;
  std::vector<int32_t> labels_;
  std::vector<index_t> indices_;
  RowWriter<scalar_t> writer_;
};

// input [planes, H, W], output and indices [planes, rows, columns]
template <typename scalar_t, typename index_t>
void pool_planar(const scalar_t* input, scalar_t* output, index_t* indices, const Windows& windows, int64_t planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = windows.y.output, columns = windows.x.output;
  const int64_t total = planes * rows * columns;
  const bool stream_output = worth_streaming<scalar_t>(total), stream_indices = worth_streaming<index_t>(total);
  std::vector<int32_t> first(round_up(columns));
  for (int64_t ox = 0; ox < columns; ++ox) first[ox] = windows.label(0, windows.x.first_tap(ox));
  parallel_slices(planes * rows, slice_count(planes * rows, ceil_divide(4096, columns)), [&](int64_t, int64_t begin, int64_t end) {
    PhaseRows<scalar_t> phases(windows, -std::numeric_limits<compute_t>::infinity());
    Pool<scalar_t, index_t> pool(windows, columns, stream_output, stream_indices);
    std::vector<int64_t> offset(windows.x.kernel);
    for (int64_t kw = 0; kw < windows.x.kernel; ++kw) offset[kw] = phases.layout().tap(kw);
    std::vector<Tap<compute_t>> taps;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / rows, oy = row % rows;
      const int64_t top = plane * windows.y.input + windows.y.start(oy);
      taps.clear();
      for (int64_t kh = windows.y.first_tap(oy); kh < windows.y.end_tap(oy); ++kh) {
        const compute_t* values = phases.get(input, top + kh * windows.y.dilation);
        for (int64_t kw = 0; kw < windows.x.kernel; ++kw) taps.push_back({values + offset[kw], windows.label(kh, kw)});
      }
      const int32_t above = windows.label(windows.y.first_tap(oy), 0);
      pool.maximum(taps, 0, columns, first.data(), above, [](const compute_t* from) { return simd::load(from); });
      pool.index(0, columns, oy, 0, 1);
      pool.write(output + row * columns, indices + row * columns, columns);
    }
    simd::stream_fence();
  });
}

// input [images, H, W, C], output and indices [images, rows, columns, C]
template <typename scalar_t, typename index_t>
void pool_interleaved(const scalar_t* input, scalar_t* output, index_t* indices, const Windows& windows,
                      const Planes& planes) {
  const int64_t rows = windows.y.output, columns = windows.x.output, channels = planes.channels;
  const int64_t total = planes.images * rows * columns * channels;
  const bool stream_output = worth_streaming<scalar_t>(total), stream_indices = worth_streaming<index_t>(total);
  const int64_t run = std::min(columns, ceil_divide(kRunElements, channels));  // windows written at a time
  const scalar_t* past_end = input + planes.images * windows.y.input * windows.x.input * channels;
  const int64_t least_rows = ceil_divide(4096, columns * channels);
  parallel_slices(planes.images * rows, slice_count(planes.images * rows, least_rows), [&](int64_t, int64_t begin, int64_t end) {
    Pool<scalar_t, index_t> pool(windows, run * channels, stream_output, stream_indices);
    std::vector<Tap<scalar_t>> taps;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / rows, oy = row % rows;
      const scalar_t* pixels = input + image * windows.y.input * windows.x.input * channels;
      for (int64_t ox = 0; ox < columns; ++ox) {
        const int64_t first_kh = windows.y.first_tap(oy), first_kw = windows.x.first_tap(ox);
        const int64_t end_kh = windows.y.end_tap(oy), end_kw = windows.x.end_tap(ox);
        taps.clear();
        for (int64_t kh = first_kh; kh < end_kh; ++kh) {
          const int64_t y = windows.y.start(oy) + kh * windows.y.dilation;
          for (int64_t kw = first_kw; kw < end_kw; ++kw) {
            const int64_t x = windows.x.start(ox) + kw * windows.x.dilation;
            taps.push_back({pixels + (y * windows.x.input + x) * channels, windows.label(kh, kw)});
          }
        }
        const int64_t at = ox % run * channels;
        pool.maximum(taps, at, channels, nullptr, windows.label(first_kh, first_kw),
                     [&](const scalar_t* from) { return load_before(from, past_end); });
        pool.index(at, channels, oy, ox, 0);
        if (ox % run == run - 1 || ox == columns - 1) {
          const int64_t to = (row * columns + ox - ox % run) * channels;
          pool.write(output + to, indices + to, at + channels);
        }
      }
    }
    simd::stream_fence();
  });
}

template <typename scalar_t, typename index_t>
void pool(const Tensor& input, const Tensor& output, const Tensor& indices, const Windows& windows,
          const Planes& planes) {
  const scalar_t* from = input.const_data_ptr<scalar_t>();
  scalar_t* to = output.mutable_data_ptr<scalar_t>();
  index_t* places = indices.mutable_data_ptr<index_t>();
  if (planes.channels_last) pool_interleaved(from, to, places, windows, planes);
  else pool_planar(from, to, places, windows, planes.images * planes.channels);
}

void forward(const Tensor& input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
             std::vector<int64_t> padding, std::vector<int64_t> dilation, const Tensor& output,
             const Tensor& indices) {
  const Planes planes = planes_of(input, output, indices);
  const Windows windows = windows_of(input, output, indices, kernel_size, stride, padding, dilation);
  use_huge_pages(output);
  use_huge_pages(indices);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    if (windows.flat) pool<scalar_t, int64_t>(input, output, indices, windows, planes);
    else pool<scalar_t, uint8_t>(input, output, indices, windows, planes);
  });
}

void backward(const Tensor& grad_output, const Tensor& indices, std::vector<int64_t> kernel_size,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
              const Tensor& grad_input) {
  const Planes planes = planes_of(grad_input, grad_output, indices);
  use_huge_pages(grad_input);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    if (kernel_size.empty()) {
      Outside passed_over;
      scatter<Add, scalar_t>(grad_output, indices, grad_input, planes, passed_over);
    } else {
      const Windows windows = windows_of(grad_input, grad_output, indices, kernel_size, stride, padding, dilation);
      spread<Add, scalar_t>(grad_output, indices, grad_input, windows, planes);
    }
  });
}

}  // namespace
}  // namespace fastseg::pooling

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_max_pool2d_forward", TORCH_BOX(&fastseg::pooling::forward));
  m.impl("_max_pool2d_backward", TORCH_BOX(&fastseg::pooling::backward));
}
