// max_unpool2d on the CPU: pooled values back to their pixels, and the gradient. Formulas and measurements:
// README.md.
#include <atomic>
#include <stdexcept>

#include <torch/csrc/stable/library.h>

#include "fastseg/huge_pages.h"
#include "max_pool2d/phases.h"
#include "max_pool2d/quads.h"
#include "max_pool2d/rows.h"
#include "max_pool2d/scatter.h"
#include "max_pool2d/spread.h"
#include "max_pool2d/windows.h"

namespace fastseg::pooling {
namespace {

uint8_t largest(const uint8_t* offsets, int64_t count) {
  uint8_t found = 0;
  for (int64_t i = 0; i < count; ++i) found = std::max(found, offsets[i]);
  return found;
}

// Whether `count` offsets are all taps inside the image: channels of window ox of row oy, and of more windows
// of this row if it and those lie inside with all their columns.
FASTSEG_INLINE bool offsets_inside(const uint8_t* offsets, int64_t count, const Windows& windows, int64_t oy,
                                   int64_t ox) {
  const Axis &y = windows.y, &x = windows.x;
  const int64_t first_kh = y.first_tap(oy), end_kh = y.end_tap(oy);
  const int64_t first_kw = x.first_tap(ox), end_kw = x.end_tap(ox);
  if (first_kh == 0 && end_kh == y.kernel && first_kw == 0 && end_kw == x.kernel) {
    return largest(offsets, count) < windows.taps();
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kh = offsets[i] / x.kernel, kw = offsets[i] % x.kernel;
    if (kh < first_kh || kh >= end_kh || kw < first_kw || kw >= end_kw) return false;
  }
  return true;
}

// Windows of a row whose taps all lie inside it: [first, end).
std::pair<int64_t, int64_t> whole_windows(const Axis& x) {
  int64_t first = 0, end = x.output;
  while (first < end && x.first_tap(first) > 0) ++first;
  while (end > first && x.end_tap(end - 1) < x.kernel) --end;
  return {first, end};
}

[[noreturn]] void refuse_offsets() {
  throw std::runtime_error(
      "fastseg.ops.max_unpool2d: indices holds an offset that is no pixel of its window; allowed: the indices of "
      "a pooling with this geometry");
}

void check_offsets(const Tensor& indices, const Windows& windows, const Planes& planes) {
  const uint8_t* offsets = indices.const_data_ptr<uint8_t>();
  std::atomic<bool> inside{true};
  const auto [first, end] = whole_windows(windows.x);
  const bool whole_columns = first == 0 && end == windows.x.output;
  if (whole_columns && windows.y.padding == 0 && windows.y.end_tap(windows.y.output - 1) == windows.y.kernel) {
    const int64_t count = indices.numel();
    parallel_slices(count, slice_count(count, 1 << 18), [&](int64_t, int64_t begin, int64_t last) {
      if (largest(offsets + begin, last - begin) >= windows.taps()) inside.store(false, std::memory_order_relaxed);
    });
  } else {
    const int64_t channels = planes.channels_last ? planes.channels : 1;
    const int64_t rows = windows.y.output, columns = windows.x.output;
    const int64_t items = planes.images * planes.channels / channels * rows;
    const int64_t slices = slice_count(items, ceil_divide(1 << 16, columns * channels));
    parallel_slices(items, slices, [&, first = first, end = end](int64_t, int64_t begin, int64_t last) {
      bool all = true;
      for (int64_t row = begin; row < last; ++row) {
        const uint8_t* from = offsets + row * columns * channels;
        const int64_t oy = row % rows;
        for (int64_t ox = 0; ox < columns; ++ox) {
          if (ox == first && ox < end) {
            all &= offsets_inside(from + ox * channels, (end - first) * channels, windows, oy, ox);
            ox = end - 1;
          } else {
            all &= offsets_inside(from + ox * channels, channels, windows, oy, ox);
          }
        }
      }
      if (!all) inside.store(false, std::memory_order_relaxed);
    });
  }
  if (!inside.load()) refuse_offsets();
}

// ---- the gradient by compact indices: every window looks for its index among its taps ----

template <typename value_t, typename scalar_t, typename Load>
FASTSEG_INLINE void choose(const Taps<value_t>& taps, int64_t first, int64_t end, const uint8_t* offsets,
                           int64_t count, scalar_t* chosen, const Load& load) {
  using compute_t = simd::accumulate<scalar_t>;
  for_lanes(count, [&](int64_t i, auto vectors) {
    simd::vec<compute_t> lanes[vectors]{};
    Labels<compute_t> wanted[vectors];
    for (int v = 0; v < vectors; ++v) wanted[v] = load_labels<compute_t>(offsets + i + v * kLanes);
    taps.for_each(first, end, [&](const value_t* values, int32_t label) {
      for (int v = 0; v < vectors; ++v) {
        const auto here = wanted[v] == splat_label<compute_t>(label);
        lanes[v] = simd::select(here, load(values + i + v * kLanes), lanes[v]);
      }
    });
    for (int v = 0; v < vectors; ++v) simd::store(chosen + i + v * kLanes, lanes[v]);
  });
}

// image [planes, H, W], offsets and pooled [planes, rows, columns]
template <typename scalar_t>
void choose_planar(const scalar_t* image, const uint8_t* offsets, scalar_t* pooled, const Windows& windows,
                   int64_t planes) {
  using compute_t = simd::accumulate<scalar_t>;
  const int64_t rows = windows.y.output, columns = windows.x.output;
  parallel_rows(planes * rows, columns, [&](int64_t begin, int64_t end) {
    PhaseRows<scalar_t> phases(windows, 0);
    ReadableRow<uint8_t> labels(offsets + planes * rows * columns);
    Taps<compute_t> taps;
    for (int64_t kw = 0; kw < windows.x.kernel; ++kw) {
      taps.columns.push_back({phases.layout().tap(kw), windows.label(0, kw)});
    }
    OutputStream<scalar_t> chosen(pooled + begin * columns, columns, planes * rows * columns);
    for (int64_t row = begin; row < end; ++row) {
      phases.taps_of(image, row / rows, row % rows, taps);
      choose(taps, 0, windows.x.kernel, labels.get(offsets + row * columns, columns), columns, chosen.next(columns),
             [](const compute_t* values) { return simd::load(values); });
    }
    chosen.finish();
  });
}

// image [images, H, W, C], offsets and pooled [images, rows, columns, C]
template <typename scalar_t>
void choose_interleaved(const scalar_t* image, const uint8_t* offsets, scalar_t* pooled, const Windows& windows,
                        const Planes& planes) {
  const Axis& x = windows.x;
  const int64_t rows = windows.y.output, channels = planes.channels, length = x.output * channels;
  const int64_t all_rows = planes.images * rows;
  const scalar_t* past_end = image + planes.images * windows.y.input * x.input * channels;
  parallel_rows(all_rows, length, [&](int64_t begin, int64_t end) {
    ReadableRow<uint8_t> readable_labels(offsets + all_rows * length);
    Taps<scalar_t> taps;
    taps.columns.resize(x.kernel);
    OutputStream<scalar_t> chosen(pooled + begin * length, channels, all_rows * length);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t number = row / rows, oy = row % rows;
      rows_of_taps(image + number * windows.y.input * x.input * channels, windows, oy, channels, taps);
      const uint8_t* labels = readable_labels.get(offsets + row * length, length);
      for (int64_t ox = 0; ox < x.output; ++ox) {
        columns_of_taps(windows, ox, channels, taps);
        choose(taps, x.first_tap(ox), x.end_tap(ox), labels + ox * channels, channels, chosen.next(channels),
               [&](const scalar_t* values) { return load_before(values, past_end); });
      }
    }
    chosen.finish();
  });
}

// Calls body(quads) if int64 indices may come from a pooling with windows of 2x2 side by side, as most do, and going by
// these pays: planes that stay in the caches are as fast element by element. The result is whether the indices do come
// from there, as body finds out; if not, everything it wrote is to be written again.
template <typename Body>
bool as_quads(const Tensor& image, const Tensor& pooled, const Tensor& indices, const Planes& planes,
              const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const Body& body) {
  using Pair = std::vector<int64_t>;
  constexpr int64_t kWidest = int64_t{1} << 30;  // labels have 32 bits
  constexpr int64_t kShortestFlat = 48;          // windows; measured
  if (kernel_size != Pair{2, 2} || stride != Pair{2, 2} || padding != Pair{0, 0} || dilation != Pair{1, 1} ||
      image.size(2) < 2 * pooled.size(2) || image.size(3) < 2 * pooled.size(3) || image.size(3) >= kWidest) {
    return false;
  }
  const bool large = image.numel() * static_cast<int64_t>(image.element_size()) >= kStreamedBytes;
  if (!planes.channels_last && !(large && pooled.size(3) >= kShortestFlat)) return false;
  const Windows windows = windows_of(image, pooled, indices, kernel_size, stride, padding, dilation);
  bool fits = are_quads(windows, planes);
  if (fits) with_quads(windows, planes, [&](const auto& quads) { fits = body(quads); });
  return fits;
}

void forward(const Tensor& input, const Tensor& indices, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
             std::vector<int64_t> /*size*/, const Tensor& output) {
  if (output.numel() == 0) return;
  const Planes planes = planes_of(output, input, indices);
  use_huge_pages(output);
  with_floating_type(input, "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* pooled = input.const_data_ptr<scalar_t>();
    scalar_t* image = output.mutable_data_ptr<scalar_t>();
    if (indices.scalar_type() == ScalarType::Long) {
      const auto spread = [&](const auto& quads) {
        return spread_quads(pooled, indices.const_data_ptr<int64_t>(), image, quads);
      };
      if (as_quads(output, input, indices, planes, kernel_size, stride, padding, dilation, spread)) return;
      Outside outside;
      scatter<Last, scalar_t>(input, indices, output, nullptr, planes, outside);
      outside.check(output.size(2), output.size(3));
      return;
    }
    const Windows windows = windows_of(output, input, indices, kernel_size, stride, padding, dilation);
    const uint8_t* offsets = indices.const_data_ptr<uint8_t>();
    if (are_quads(windows, planes)) {
      with_quads(windows, planes, [&](const auto& quads) {
        if (!spread_quads(pooled, offsets, image, quads)) refuse_offsets();
      });
      return;
    }
    check_offsets(indices, windows, planes);
    if (rows_pay(windows, planes, kShortestSpread)) {
      spread<Last, scalar_t>(input, indices, output, windows, planes);
    } else {
      Outside none;  // the offsets have been checked
      scatter<Last, scalar_t>(input, indices, output, &windows, planes, none);
    }
  });
}

void backward(const Tensor& grad_output, const Tensor& indices, std::vector<int64_t> kernel_size,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
              const Tensor& grad_input) {
  if (grad_input.numel() == 0) return;
  const Planes planes = planes_of(grad_output, grad_input, indices);
  use_huge_pages(grad_input);
  with_floating_type(grad_output, "grad_output", [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* image = grad_output.const_data_ptr<scalar_t>();
    scalar_t* pooled = grad_input.mutable_data_ptr<scalar_t>();
    if (indices.scalar_type() == ScalarType::Long) {
      const auto choose = [&](const auto& quads) {
        return choose_quads(image, indices.const_data_ptr<int64_t>(), pooled, quads);
      };
      if (as_quads(grad_output, grad_input, indices, planes, kernel_size, stride, padding, dilation, choose)) return;
      Outside outside;
      gather<int64_t, scalar_t>(grad_output, indices, grad_input, nullptr, planes, outside);
      outside.check(grad_output.size(2), grad_output.size(3));
      return;
    }
    const Windows windows = windows_of(grad_output, grad_input, indices, kernel_size, stride, padding, dilation);
    const uint8_t* offsets = indices.const_data_ptr<uint8_t>();
    if (are_quads(windows, planes)) {
      with_quads(windows, planes, [&](const auto& quads) {
        if (!choose_quads(image, offsets, pooled, quads)) refuse_offsets();
      });
      return;
    }
    check_offsets(indices, windows, planes);
    if (!rows_pay(windows, planes, kShortestChoice)) {
      Outside none;  // the offsets have been checked
      gather<uint8_t, scalar_t>(grad_output, indices, grad_input, &windows, planes, none);
    } else if (planes.channels_last) {
      choose_interleaved(image, offsets, pooled, windows, planes);
    } else {
      choose_planar(image, offsets, pooled, windows, planes.images * planes.channels);
    }
  });
}

}  // namespace
}  // namespace fastseg::pooling

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_max_unpool2d", TORCH_BOX(&fastseg::pooling::forward));
  m.impl("_max_unpool2d_backward", TORCH_BOX(&fastseg::pooling::backward));
}
