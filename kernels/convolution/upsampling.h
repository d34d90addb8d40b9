// Dense transposed convolution by a stride of 2, 4, ..., 32 columns, and its two transposes, as products of panels.
//
// small [N, S, h, w], big [N, B, H, W], weight [S, B, kh, kw]: tap (r, s) joins pixel (i, j) of the small map to
//     big row i * sh + r - top,  big column j * sw + s - left.
// Big columns are counted from `left` columns before the image. 16 of them are a vector: a group u of 16 / sw small
// columns with all phases, or for sw = 32 half of the phases of one small column (one of two parts). For tap
// s = t * sw + phase a big column takes the small column t to the left of it. So with
//     X[s][t][u]      the small columns of group u moved by t, each repeated for its phases,
//     G[r][..]        a row of the big map, read at u * 16 * parts + part * 16 (moved by t * sw for the convolution),
//     V[..][t][part]  the taps t * sw + phase, repeated for the columns of a group,
// all three maps are sums of products of vectors, without a shuffle in the inner loop:
//     big    [b][row][u, part] = sum over s, r, t of X V
//     small  [s][i][u]         = sum over b, r, t, part of G V, then over phases
//     weight [s][b][r][t]      = sum over i, u of X G, then over the columns of a group
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg::upsampling {

struct Shape {
  int64_t images, small_channels, big_channels;
  int64_t small_height, small_width, big_height, big_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, top, left;

  int64_t taps() const { return ceil_divide(kernel_width, stride_width); }  // t
  int64_t parts() const { return std::max<int64_t>(1, stride_width / simd::kLanes); }
  int64_t columns() const { return std::max<int64_t>(1, simd::kLanes / stride_width); }  // of a group
  int64_t groups() const { return ceil_divide(small_width + taps() - 1, columns()); }    // u
  // For small row i: the big row of its first tap, and the range of its taps inside of the image.
  int64_t top_row(int64_t i) const { return i * stride_height - top; }
  int64_t first_tap(int64_t i) const { return std::clamp<int64_t>(-top_row(i), 0, kernel_height); }
  int64_t last_tap(int64_t i) const {
    return std::clamp<int64_t>(big_height - top_row(i), first_tap(i), kernel_height);
  }
  int64_t rows_above() const { return ceil_divide(kernel_height, stride_height); }  // small rows that a big row takes
};

// A tile of kRows channels by kGroups groups of columns is summed in registers.
constexpr int kRows = simd::kRegisterBytes == 64 ? 6 : 2;
constexpr int kGroups = simd::kRegisterBytes == 64 ? 4 : simd::kRegisterBytes == 32 ? 2 : 1;

// sums[row][group] += sum over runs and k of factors[row][k] * values[group][k], where each item is a vector. Distances
// are in elements.
template <typename accumulate_t>
struct Product {
  struct Run {
    const accumulate_t* factors;
    const accumulate_t* values;
  };
  accumulate_t* sums;
  int64_t sum_row, sum_group;
  int64_t factor_row, factor_step, value_group, value_step;
  int64_t depth;
  std::vector<Run> runs;
};

template <typename accumulate_t, int rows, int groups>
__attribute__((noinline)) void multiply_tile(const Product<accumulate_t>& product, int64_t row, int64_t group) {
  using vec_t = simd::vec<accumulate_t>;
  const auto& p = product;
  accumulate_t* const at = p.sums + row * p.sum_row + group * p.sum_group;
  vec_t sums[rows][groups] = {};  // from 0, not from p.sums: short chains of additions round less
  for (const auto& run : p.runs) {
    const accumulate_t* factors = run.factors + row * p.factor_row;
    const accumulate_t* values = run.values + group * p.value_group;
    for (int64_t k = 0; k < p.depth; ++k, factors += p.factor_step, values += p.value_step) {
      vec_t value[groups];
      FASTSEG_UNROLL
      for (int g = 0; g < groups; ++g) value[g] = simd::load(values + g * p.value_group);
      FASTSEG_UNROLL
      for (int c = 0; c < rows; ++c) {
        const vec_t factor = simd::load(factors + c * p.factor_row);
        FASTSEG_UNROLL
        for (int g = 0; g < groups; ++g) sums[c][g] += factor * value[g];
      }
    }
  }
  FASTSEG_UNROLL
  for (int c = 0; c < rows; ++c) {
    FASTSEG_UNROLL
    for (int g = 0; g < groups; ++g) {
      accumulate_t* const sum = at + c * p.sum_row + g * p.sum_group;
      simd::store(sum, simd::load(sum) + sums[c][g]);
    }
  }
}

// multiply_tile for sizes known at run time, at most `rows` and `groups`.
template <typename accumulate_t, int rows = kRows, int groups = kGroups>
void multiply_block(const Product<accumulate_t>& product, int64_t row, int64_t row_count, int64_t group,
                    int64_t group_count) {
  if constexpr (rows > 1) {
    if (row_count < rows) {
      return multiply_block<accumulate_t, rows - 1, groups>(product, row, row_count, group, group_count);
    }
  }
  if constexpr (groups > 1) {
    if (group_count < groups) {
      return multiply_block<accumulate_t, rows, groups - 1>(product, row, row_count, group, group_count);
    }
  }
  multiply_tile<accumulate_t, rows, groups>(product, row, group);
}

// The whole product, in blocks of nearly equal size: the factors of a block of rows stay in the cache for all groups.
template <typename accumulate_t>
void multiply(const Product<accumulate_t>& product, int64_t rows, int64_t groups) {
  const int64_t row_blocks = ceil_divide(rows, kRows), group_blocks = ceil_divide(groups, kGroups);
  for (int64_t i = 0; i < row_blocks; ++i) {
    const int64_t row = rows * i / row_blocks, next_row = rows * (i + 1) / row_blocks;
    for (int64_t j = 0; j < group_blocks; ++j) {
      const int64_t group = groups * j / group_blocks, next_group = groups * (j + 1) / group_blocks;
      multiply_block(product, row, next_row - row, group, next_group - group);
    }
  }
}

// Tap vector (s, b, r, t, part): the taps of one weight, repeated for the columns of a group; 0 beyond the kernel.
template <typename scalar_t, typename accumulate_t>
void pack_taps(const Shape& shape, const scalar_t* weight, int64_t r, int64_t t, int64_t part, accumulate_t* to) {
  for (int64_t lane = 0; lane < simd::kLanes; ++lane) {
    const int64_t tap = t * shape.stride_width + part * simd::kLanes + lane % shape.stride_width;
    to[lane] = tap < shape.kernel_width ? accumulate_t(weight[r * shape.kernel_width + tap]) : accumulate_t(0);
  }
}

// X of one row: small [S] planes of `plane` elements, row of w elements -> [S][t][u] vectors.
template <typename scalar_t, typename accumulate_t>
void pack_small_row(const Shape& shape, const scalar_t* row, int64_t plane, accumulate_t* to) {
  const int64_t columns = shape.columns(), repeat = simd::kLanes / columns, groups = shape.groups();
  for (int64_t s = 0; s < shape.small_channels; ++s, row += plane) {
    for (int64_t t = 0; t < shape.taps(); ++t) {
      for (int64_t column = -t; column < groups * columns - t; ++column, to += repeat) {
        const bool inside = column >= 0 && column < shape.small_width;
        std::fill_n(to, repeat, inside ? accumulate_t(row[column]) : accumulate_t(0));
      }
    }
  }
}

// Elements of a padded row of the big map: all groups, and the taps beyond the last, in whole vectors.
inline int64_t padded_width(const Shape& shape) {
  const int64_t beyond = ceil_divide(shape.taps() * shape.stride_width, simd::kLanes);
  return (shape.groups() * shape.parts() + beyond) * simd::kLanes;
}

// A row of W elements with zeros for the columns before and after the image -> [padded_width].
template <typename scalar_t, typename accumulate_t>
void pack_big_row(const Shape& shape, const scalar_t* row, accumulate_t* to) {
  const int64_t width = padded_width(shape), before = std::min(shape.left, width);
  const int64_t inside = std::clamp<int64_t>(shape.big_width, 0, width - before);
  std::fill_n(to, before, accumulate_t(0));
  std::copy_n(row, inside, to + before);
  std::fill_n(to + before + inside, width - before - inside, accumulate_t(0));
}

template <typename accumulate_t>
using Panel = std::vector<simd::vec<accumulate_t>>;

template <typename vec_t>
auto lanes_of(std::vector<vec_t>& panel, int64_t place) {
  return reinterpret_cast<simd::lane_of<vec_t>*>(panel.data() + place);
}

// Rows of one channel of the big map, packed when first needed: neighbouring small rows share big rows.
template <typename scalar_t>
class BigRows {
 public:
  explicit BigRows(const Shape& shape)
      : shape_(shape), width_(padded_width(shape)),
        rows_(((kBlock - 1) * shape.stride_height + shape.kernel_height) * width_ / simd::kLanes) {}

  static constexpr int64_t kBlock = 8;  // small rows that are computed for a channel before the next channel

  // Starts with row `top`, which may lie above the image.
  void restart(const scalar_t* plane, int64_t top) {
    plane_ = plane, top_ = top;
    next_ = std::max<int64_t>(0, top);
  }
  // Packs all rows up to `row` (inside of the image) and returns it.
  const simd::accumulate<scalar_t>* operator()(int64_t row) {
    for (; next_ <= row; ++next_) {
      pack_big_row(shape_, plane_ + next_ * shape_.big_width, lanes_of(rows_, 0) + (next_ - top_) * width_);
    }
    return lanes_of(rows_, 0) + (row - top_) * width_;
  }
  int64_t width() const { return width_; }

 private:
  const Shape& shape_;
  int64_t width_, top_ = 0, next_ = 0;
  const scalar_t* plane_ = nullptr;
  Panel<simd::accumulate<scalar_t>> rows_;
};

// Calls body(n, first row, last row) for blocks of rows of the small map; items count the rows of all images.
template <typename Body>
void in_row_blocks(const Shape& shape, int64_t begin, int64_t end, int64_t most, const Body& body) {
  while (begin < end) {
    const int64_t n = begin / shape.small_height, i = begin % shape.small_height;
    const int64_t last = std::min({i + most, i + end - begin, shape.small_height});
    body(n, i, last);
    begin += last - i;
  }
}

// The big map from the small one: calls store(n, b, row, sums) with the W sums of a row.
template <typename scalar_t, typename Store>
void spread(const Shape& shape, const scalar_t* small, const scalar_t* weight, const Store& store) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vec_t = simd::vec<accumulate_t>;
  const int64_t taps = shape.taps(), parts = shape.parts(), groups = shape.groups(), above = shape.rows_above();
  const int64_t S = shape.small_channels, B = shape.big_channels, kernel = shape.kernel_height * shape.kernel_width;
  Panel<accumulate_t> factors(shape.kernel_height * parts * S * taps * B);  // [r][part][s][t][b]
  int64_t place = 0;
  for (int64_t r = 0; r < shape.kernel_height; ++r) {
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t b = 0; b < B; ++b, ++place) {
            pack_taps(shape, weight + (s * B + b) * kernel, r, t, part, lanes_of(factors, place));
          }
        }
      }
    }
  }
  // Steps: sh rows of the big map that meet the same small rows.
  const int64_t first_step = shape.top / shape.stride_height;
  const int64_t steps = (shape.big_height - 1 + shape.top) / shape.stride_height + 1 - first_step;
  const UnevenSlices slices(shape.images * steps);
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    const int64_t panel = S * taps * groups;
    const int64_t length = std::max(groups * parts, ceil_divide(shape.left + shape.big_width, simd::kLanes));
    Panel<accumulate_t> values(above * panel);  // the small rows step, step - 1, ..., row i at i % above
    Panel<accumulate_t> totals(B * length);     // [b][u][part], zeros beyond the last tap
    Product<accumulate_t> product;
    product.sum_row = length * simd::kLanes, product.sum_group = parts * simd::kLanes;
    product.factor_row = simd::kLanes, product.factor_step = B * simd::kLanes;
    product.value_group = simd::kLanes, product.value_step = groups * simd::kLanes;
    product.depth = S * taps;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / steps, step = first_step + item % steps;
      const bool fresh = item == begin || item % steps == 0;
      for (int64_t i = std::max<int64_t>(0, fresh ? step - above + 1 : step);
           i <= std::min(step, shape.small_height - 1); ++i) {
        const scalar_t* row = small + (n * S * shape.small_height + i) * shape.small_width;
        pack_small_row(shape, row, shape.small_height * shape.small_width, lanes_of(values, i % above * panel));
      }
      for (int64_t phase = 0; phase < shape.stride_height; ++phase) {
        const int64_t row = step * shape.stride_height + phase - shape.top;
        if (row < 0 || row >= shape.big_height) continue;
        std::fill(totals.begin(), totals.end(), vec_t{});
        for (int64_t part = 0; part < parts; ++part) {
          product.sums = lanes_of(totals, part);
          for (int64_t r = phase, i = step; r < shape.kernel_height; r += shape.stride_height, --i) {
            if (i < 0 || i >= shape.small_height) continue;
            // One row of taps at a time, so that the factors stay in the first-level cache.
            const int64_t place = (r * parts + part) * S * taps * B;
            product.runs = {{lanes_of(factors, place), lanes_of(values, i % above * panel)}};
            multiply(product, B, groups);
          }
        }
        for (int64_t b = 0; b < B; ++b) store(n, b, row, lanes_of(totals, b * length) + shape.left);
      }
    }
  });
}

// The small map from the big one: calls store(n, s, i, column, sum) for every element.
template <typename scalar_t, typename Store>
void collect(const Shape& shape, const scalar_t* big, const scalar_t* weight, const Store& store) {
  using accumulate_t = simd::accumulate<scalar_t>;
  using vec_t = simd::vec<accumulate_t>;
  const int64_t taps = shape.taps(), parts = shape.parts(), S = shape.small_channels, B = shape.big_channels;
  const int64_t kernel = shape.kernel_height * shape.kernel_width;
  const int64_t groups = ceil_divide(shape.small_width, shape.columns());
  Panel<accumulate_t> factors(B * shape.kernel_height * taps * parts * S);  // [b][r][t][part][s]
  int64_t place = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t r = 0; r < shape.kernel_height; ++r) {
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t s = 0; s < S; ++s, ++place) {
            pack_taps(shape, weight + (s * B + b) * kernel, r, t, part, lanes_of(factors, place));
          }
        }
      }
    }
  }
  const UnevenSlices slices(shape.images * shape.small_height);
  slices.run([&](int64_t, int64_t begin, int64_t end) {
    BigRows<scalar_t> rows(shape);
    Panel<accumulate_t> totals(BigRows<scalar_t>::kBlock * S * groups);  // [i][s][u]
    Product<accumulate_t> product;
    product.sum_row = groups * simd::kLanes, product.sum_group = simd::kLanes;
    product.factor_row = simd::kLanes, product.factor_step = S * simd::kLanes;
    product.value_group = parts * simd::kLanes;
    product.value_step = std::min<int64_t>(shape.stride_width, simd::kLanes);
    product.depth = taps * parts;
    in_row_blocks(shape, begin, end, BigRows<scalar_t>::kBlock, [&](int64_t n, int64_t first, int64_t last) {
      std::fill(totals.begin(), totals.end(), vec_t{});
      for (int64_t b = 0; b < B; ++b) {
        rows.restart(big + (n * B + b) * shape.big_height * shape.big_width, shape.top_row(first));
        for (int64_t i = first; i < last; ++i) {
          product.runs.clear();
          for (int64_t r = shape.first_tap(i); r < shape.last_tap(i); ++r) {
            const int64_t place = (b * shape.kernel_height + r) * taps * parts * S;
            product.runs.push_back({lanes_of(factors, place), rows(shape.top_row(i) + r)});
          }
          product.sums = lanes_of(totals, (i - first) * S * groups);
          multiply(product, S, groups);
        }
      }
      const int64_t columns = shape.columns(), repeat = simd::kLanes / columns;
      for (int64_t i = first; i < last; ++i) {
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t column = 0; column < shape.small_width; ++column) {
            const accumulate_t* lanes = lanes_of(totals, ((i - first) * S + s) * groups) + column * repeat;
            accumulate_t sum = 0;
            for (int64_t lane = 0; lane < repeat; ++lane) sum += lanes[lane];
            store(n, s, i, column, sum);
          }
        }
      }
    });
  });
}

// grad_weight [S, B, kh, kw]: calls store(s, b, r, tap, sum) for every element.
template <typename scalar_t, typename Store>
void correlate(const Shape& shape, const scalar_t* small, const scalar_t* big, const Store& store) {
  using accumulate_t = simd::accumulate<scalar_t>;
  const int64_t taps = shape.taps(), parts = shape.parts(), S = shape.small_channels, B = shape.big_channels;
  const int64_t groups = shape.groups(), kernel_height = shape.kernel_height;
  const int64_t items = shape.images * shape.small_height, slices = slice_count(items);
  const int64_t total = S * B * taps * parts * kernel_height;
  Panel<accumulate_t> totals(slices * total);  // [slice][b][t][part][s][r]
  parallel_slices(items, slices, [&](int64_t slice, int64_t begin, int64_t end) {
    BigRows<scalar_t> rows(shape);
    const int64_t panel = S * taps * groups;
    Panel<accumulate_t> values(BigRows<scalar_t>::kBlock * panel);  // [i][s][t][u]
    Product<accumulate_t> product;
    product.sum_row = kernel_height * simd::kLanes, product.sum_group = simd::kLanes;
    product.factor_row = taps * groups * simd::kLanes, product.factor_step = simd::kLanes;
    product.value_group = rows.width(), product.value_step = parts * simd::kLanes;
    product.depth = groups;
    in_row_blocks(shape, begin, end, BigRows<scalar_t>::kBlock, [&](int64_t n, int64_t first, int64_t last) {
      const int64_t plane = shape.small_height * shape.small_width;
      for (int64_t i = first; i < last; ++i) {
        pack_small_row(shape, small + n * S * plane + i * shape.small_width, plane,
                       lanes_of(values, (i - first) * panel));
      }
      for (int64_t b = 0; b < B; ++b) {
        rows.restart(big + (n * B + b) * shape.big_height * shape.big_width, shape.top_row(first));
        for (int64_t i = first; i < last; ++i) {
          const int64_t r_begin = shape.first_tap(i), r_end = shape.last_tap(i);
          if (r_begin >= r_end) continue;
          rows(shape.top_row(i) + r_end - 1);
          const accumulate_t* row = rows(shape.top_row(i) + r_begin);
          for (int64_t t = 0; t < taps; ++t) {
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t place = slice * total + ((b * taps + t) * parts + part) * S * kernel_height;
              product.sums = lanes_of(totals, place + r_begin);
              product.runs = {{lanes_of(values, (i - first) * panel + t * groups), row + part * simd::kLanes}};
              multiply(product, S, r_end - r_begin);
            }
          }
        }
      }
    });
  });
  const int64_t phases = std::min<int64_t>(shape.stride_width, simd::kLanes);
  for (int64_t place = 0; place < total; ++place) {
    const int64_t r = place % kernel_height, s = place / kernel_height % S, part = place / kernel_height / S % parts;
    const int64_t t = place / kernel_height / S / parts % taps, b = place / kernel_height / S / parts / taps;
    for (int64_t slice = 1; slice < slices; ++slice) totals[place] += totals[slice * total + place];
    const accumulate_t* lanes = lanes_of(totals, place);
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t tap = t * shape.stride_width + part * simd::kLanes + phase;
      if (tap >= shape.kernel_width) break;
      accumulate_t sum = 0;
      for (int64_t lane = phase; lane < simd::kLanes; lane += phases) sum += lanes[lane];
      store(s, b, r, tap, sum);
    }
  }
}

}  // namespace fastseg::upsampling
