// Bilinear sampling along one axis, by the rule of torch.nn.functional.interpolate(mode="bilinear") on the CPU.
//
// Output pixel o lies at the source coordinate
//     o (source - 1) / (output - 1)              align_corners
//     (o + 0.5) / scale - 0.5                    scale given (torch does not recompute it from the sizes)
//     (o + 0.5) source / output - 0.5            otherwise
// and at o itself where both sizes are equal. It is evaluated in double (torch: in float), fractions are float.
//
// torch clamps coordinates below 0. Here the source is padded instead by a copy of its first and of its last element,
// so that every output pixel lies inside a "cell" between two neighbours of the padded source:
//     cell q in [0, source] has the source elements left(q) = max(q - 1, 0) and right(q) = min(q, source - 1),
//     value(o) = (1 - fraction[o]) * element[left(cell[o])] + fraction[o] * element[right(cell[o])].
// Within one cell the fractions grow by the constant `step`, and cells are ordered: the outputs of cell q are
// [first[q], first[q + 1]).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastseg {

struct BilinearAxis {
  int64_t source_size;
  int64_t output_size;
  double step;                  // source elements per output pixel
  std::vector<int32_t> cell;    // [output_size], in [0, source_size], ascending
  std::vector<float> fraction;  // [output_size], in [0, 1]
  std::vector<int32_t> first;   // [source_size + 2]

  // scale: the scale_factor given to torch, or 0 for none. Sizes must be in [1, 2^31 - 2].
  BilinearAxis(int64_t source_size, int64_t output_size, bool align_corners, double scale)
      : source_size(source_size), output_size(output_size), cell(output_size), fraction(output_size),
        first(source_size + 2) {
    const double source = static_cast<double>(source_size), output = static_cast<double>(output_size);
    const bool copies = source_size == output_size;
    if (copies) {
      step = 1.0;
    } else if (align_corners) {
      step = output_size > 1 ? (source - 1) / (output - 1) : 0.0;
    } else {
      step = scale > 0 ? 1.0 / scale : source / output;
    }
    for (int64_t o = 0; o < output_size; ++o) {
      double coordinate = static_cast<double>(o);
      if (!copies && align_corners) {
        coordinate = output_size > 1 ? coordinate * (source - 1) / (output - 1) : 0.0;
      } else if (!copies) {
        coordinate = scale > 0 ? (coordinate + 0.5) / scale - 0.5 : (coordinate + 0.5) * source / output - 0.5;
      }
      const double padded = std::min(std::max(coordinate + 1.0, 0.0), source);
      cell[o] = static_cast<int32_t>(padded);
      fraction[o] = static_cast<float>(std::min(std::max(coordinate + 1.0 - cell[o], 0.0), 1.0));
    }
    int64_t next = 0;
    for (int64_t q = 0; q <= source_size; ++q) {
      while (next < output_size && cell[next] < q) ++next;
      first[q] = static_cast<int32_t>(next);
    }
    first[source_size + 1] = static_cast<int32_t>(output_size);
  }

  int64_t left(int64_t q) const { return std::max<int64_t>(q - 1, 0); }
  int64_t right(int64_t q) const { return std::min(q, source_size - 1); }

  // Output pixels of the fullest cell.
  int64_t largest_cell() const {
    int64_t largest = 0;
    for (int64_t q = 0; q <= source_size; ++q) largest = std::max<int64_t>(largest, first[q + 1] - first[q]);
    return largest;
  }
};

}  // namespace fastseg
