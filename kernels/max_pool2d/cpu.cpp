// max_pool2d on the CPU: the maximum and its index, and the gradient. Formulas and measurements: README.md.
#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "max_pool2d/phases.h"
#include "pooling/quads.h"
#include "pooling/row_streams.h"
#include "pooling/scatter.h"
#include "pooling/windows.h"

namespace fastseg::pooling {
namespace {

// The forward on one thread: from taps to rows of maxima and indices.
template <typename scalar_t, typename index_t>
class Pool {
 public:
  using compute_t = simd::accumulate<scalar_t>;

  // total: elements of the output of all threads
  Pool(scalar_t* output, index_t* indices, int64_t longest, int64_t total)
      : output_(output, longest, total), indices_(indices, longest, total) {}

  // Maxima of the next `count` windows or channels over the rows and the columns [first, end) of `taps`. empty(i): the
  // labels of lanes i, i + 1, ... if all values are -inf. An index is its label plus origin + lane * step.
  template <typename value_t, typename Empty, typename Load>
  FASTSEG_INLINE void maximum(const Taps<value_t>& taps, int64_t first, int64_t end, int64_t count, int64_t origin,
                              int64_t step, const Empty& empty, const Load& load) {
    scalar_t* output = output_.next(count);
    index_t* indices = indices_.next(count);
    for (int64_t i = 0; i < count; i += kLanes) {
      simd::vec<compute_t> best = simd::splat(-std::numeric_limits<compute_t>::infinity());
      Labels<compute_t> labels = empty(i);
      taps.for_each(first, end, [&](const value_t* values, int32_t label) {
        const simd::vec<compute_t> value = load(values + i);
        const auto taken = (value > best) | (value != value);  // the last NaN, else the first maximum
        best = simd::select(taken, value, best);
        labels = simd::select(taken, splat_label<compute_t>(label), labels);
      });
      simd::store(output + i, best);
      if constexpr (sizeof(index_t) == 1) {
        simd::store(indices + i, simd::convert<simd::u8x16>(labels));
      } else {
        const simd::i64x16 further = simd::convert<simd::i64x16>(simd::lane_index()) * step;
        simd::store(indices + i, simd::convert<simd::i64x16>(labels) + further + (origin + i * step));
      }
    }
  }

  void finish() {
    output_.finish();
    indices_.finish();
  }

 private:
  OutputStream<scalar_t> output_;
  OutputStream<index_t> indices_;
};

// input [planes, H, W], output and indices [planes, rows, columns]
template <typename scalar_t, typename index_t>
void pool_planar(const scalar_t* input, scalar_t* output, index_t* indices, const Windows& windows, int64_t planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = windows.y.output, columns = windows.x.output;
  std::vector<int32_t> first_label(round_up(columns));
  for (int64_t ox = 0; ox < columns; ++ox) first_label[ox] = windows.label(0, windows.x.first_tap(ox));
  parallel_rows(planes * rows, columns, [&](int64_t begin, int64_t end) {
    PhaseRows<scalar_t> phases(windows, -std::numeric_limits<compute_t>::infinity());
    Pool<scalar_t, index_t> pool(output + begin * columns, indices + begin * columns, columns, planes * rows * columns);
    Taps<compute_t> taps;
    for (int64_t kw = 0; kw < windows.x.kernel; ++kw) {
      taps.columns.push_back({phases.layout().tap(kw), windows.label(0, kw)});
    }
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / rows, oy = row % rows;
      phases.taps_of(input, plane, oy, taps);
      const auto above = splat_label<compute_t>(windows.label(windows.y.first_tap(oy), 0));
      const auto empty = [&](int64_t i) { return above + load_labels<compute_t>(first_label.data() + i); };
      const auto load = [](const compute_t* values) { return simd::load(values); };
      pool.maximum(taps, 0, windows.x.kernel, columns, windows.label_origin(oy, 0), windows.x.stride, empty, load);
    }
    pool.finish();
  });
}

// input [images, H, W, C], output and indices [images, rows, columns, C]
template <typename scalar_t, typename index_t>
void pool_interleaved(const scalar_t* input, scalar_t* output, index_t* indices, const Windows& windows,
                      const Planes& planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const Axis& x = windows.x;
  const int64_t rows = windows.y.output, columns = x.output, channels = planes.channels;
  const int64_t length = columns * channels;
  const scalar_t* past_end = input + planes.images * windows.y.input * x.input * channels;
  parallel_rows(planes.images * rows, length, [&](int64_t begin, int64_t end) {
    Pool<scalar_t, index_t> pool(output + begin * length, indices + begin * length, channels,
                                 planes.images * rows * length);
    Taps<scalar_t> taps;
    taps.columns.resize(x.kernel);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / rows, oy = row % rows;
      rows_of_taps(input + image * windows.y.input * x.input * channels, windows, oy, channels, taps);
      for (int64_t ox = 0; ox < columns; ++ox) {
        const int64_t first = x.first_tap(ox), origin = windows.label_origin(oy, ox);
        const auto label = splat_label<compute_t>(windows.label(windows.y.first_tap(oy), first));
        columns_of_taps(windows, ox, channels, taps);
        pool.maximum(
            taps, first, x.end_tap(ox), channels, origin, 0, [&](int64_t) { return label; },
            [&](const scalar_t* values) { return load_before(values, past_end); });
      }
    }
    pool.finish();
  });
}

template <typename scalar_t, typename index_t>
void pool(const Tensor& input, const Tensor& output, const Tensor& indices, const Windows& windows,
          const Planes& planes) {
  const scalar_t* from = input.const_data_ptr<scalar_t>();
  scalar_t* to = output.mutable_data_ptr<scalar_t>();
  index_t* places = indices.mutable_data_ptr<index_t>();
  if (are_quads(windows, planes)) {
    with_quads(windows, planes, [&](const auto& quads) { pool_quads(from, to, places, quads); });
  } else if (planes.channels_last) {
    pool_interleaved(from, to, places, windows, planes);
  } else {
    pool_planar(from, to, places, windows, planes.images * planes.channels);
  }
}

void forward(const Tensor& input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
             std::vector<int64_t> padding, std::vector<int64_t> dilation, bool /*ceil_mode*/, bool /*return_indices*/,
             bool /*compact*/, const Tensor& output, const Tensor& indices) {
  if (output.numel() == 0) return;
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
              std::vector<int64_t> /*size*/, const Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  const Planes planes = planes_of(grad_input, grad_output, indices);
  use_huge_pages(grad_input);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    Outside passed_over;
    if (kernel_size.empty()) {
      FASTSEG_CHECK(indices.scalar_type() == ScalarType::Long, "fastseg pooling: compact indices need a geometry");
      scatter<Add, scalar_t>(grad_output, indices, grad_input, nullptr, planes, passed_over);
      return;
    }
    const Windows windows = windows_of(grad_input, grad_output, indices, kernel_size, stride, padding, dilation);
    const scalar_t* pooled = grad_output.const_data_ptr<scalar_t>();
    scalar_t* image = grad_input.mutable_data_ptr<scalar_t>();
    if (are_quads(windows, planes)) {
      with_quads(windows, planes, [&](const auto& quads) {
        if (windows.flat) spread_quads(pooled, indices.const_data_ptr<int64_t>(), image, quads);
        else spread_quads(pooled, indices.const_data_ptr<uint8_t>(), image, quads);
      });
    } else if (spread_pays(windows, planes)) {
      if (windows.flat) spread(pooled, indices.const_data_ptr<int64_t>(), image, windows, planes);
      else spread(pooled, indices.const_data_ptr<uint8_t>(), image, windows, planes);
    } else {
      scatter<Add, scalar_t>(grad_output, indices, grad_input, &windows, planes, passed_over);
    }
  });
}

}  // namespace
}  // namespace fastseg::pooling

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_max_pool2d", TORCH_BOX(&fastseg::pooling::forward));
  m.impl("_max_pool2d_backward", TORCH_BOX(&fastseg::pooling::backward));
}
