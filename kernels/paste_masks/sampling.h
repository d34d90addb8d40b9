// The problem, and the taps of output pixels along one axis of a mask: the same on the CPU and on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "fastseg/exact.h"

namespace fastseg::paste_masks {

enum class Form { packed, boolean, soft };  // bits, 32 to a word; a byte for each pixel; its value

constexpr int word_pixels = 32;

struct Problem {
  int64_t images, rows, columns;  // of the masks
  int64_t height, width;          // of the output
  Form form;
  float limit;  // a pixel belongs to the mask if its value is above

  // Elements of the output in a row of pixels.
  FASTSEG_HOST_DEVICE int64_t row_size() const {
    return form == Form::packed ? (width + word_pixels - 1) / word_pixels : width;
  }
};

// The limit above which a value belongs to the mask: `threshold`, or if that is inclusive the float before it. As in
// PyTorch, fp32 values are compared with the threshold in fp32.
inline float limit_of(double threshold, bool inclusive) {
  const float rounded = static_cast<float>(threshold);
  return inclusive ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}

// The value at a pixel is the sum of weight[k] * element[index[k]].
template <int count>
struct Taps {
  int index[count];
  float weight[count];
};

enum class Convention { detectron2, torchvision };

// A mask of `cells` elements pasted into a box. Pixel p lies at
//     place(p) = (p + 0.5 - begin) / extent * scale - shift
// in elements, and samples a mask with zeros around it.
struct BoxAxis {
  double begin, extent, scale, shift;
  int cells;

  // low, high: the ends of the box.
  FASTSEG_HOST_DEVICE static BoxAxis make(Convention convention, float low, float high, int cells) {
    if (convention == Convention::detectron2) {
      return {low, static_cast<double>(high) - low, static_cast<double>(cells), 0.5, cells};
    }
    // A zero on each side; the box grows in proportion about its centre, its ends are cut to integers, both inclusive.
    const float growth = static_cast<float>((cells + 2.0) / cells);
    const float centre = multiply(high + low, 0.5f), half = multiply(multiply(high - low, 0.5f), growth);
    const double first = ::trunc(static_cast<double>(centre - half));
    const double last = ::trunc(static_cast<double>(centre + half));
    return {first, last - first + 1.0, cells + 2.0, 1.5, cells};
  }

  // False for a box with NaN or infinite ends, or without extent (in torchvision's convention: with a negative one).
  FASTSEG_HOST_DEVICE bool is_valid() const {
    constexpr double most = 1e300;
    return begin > -most && begin < most && extent > 0 && extent < most;
  }

  // False if the mask does not reach the pixel. Indices are those of the mask with a zero on each side.
  FASTSEG_HOST_DEVICE bool sample(int pixel, Taps<2>& taps) const {
    const double place = multiply((pixel + 0.5 - begin) / extent, scale) - shift;
    if (!(place > -1 && place < cells)) return false;
    const double low = ::floor(place);
    taps.index[0] = static_cast<int>(low) + 1;
    taps.index[1] = taps.index[0] + 1;
    taps.weight[0] = static_cast<float>(1 - (place - low));
    taps.weight[1] = static_cast<float>(place - low);
    return true;
  }

  // A range [first, end) within [0, size) that contains all pixels that the mask reaches.
  FASTSEG_HOST_DEVICE void reach(int size, int& first, int& end) const {
    first = end = 0;
    if (!is_valid()) return;
    const double slack = 2 + 1e-12 * (::fabs(begin) + extent);  // for rounding errors
    const double low = begin + extent * (shift - 1) / scale - slack;
    const double high = begin + extent * (cells + shift) / scale + slack;
    first = static_cast<int>(::fmin(::fmax(low, 0.0), static_cast<double>(size)));
    end = static_cast<int>(::fmin(::fmax(high, 0.0), static_cast<double>(size)));
  }
};

// Two successive interpolations by the rule of torch.nn.functional.interpolate(mode="bilinear"): `source` elements to
// `padded`, of which the first `input` are interpolated to `output`.
struct ResizeAxis {
  int source, padded, input, output;
  double step = static_cast<double>(source) / padded, last_step = static_cast<double>(input) / output;

  FASTSEG_HOST_DEVICE bool is_single() const { return source == padded || input == output; }

  // Two taps if is_single(), else four.
  template <int count>
  FASTSEG_HOST_DEVICE Taps<count> sample(int pixel) const {
    if constexpr (count == 2) return sample_single(pixel);
    else return sample_both(pixel);
  }

 private:
  struct Pair {
    int low, high;
    double share;  // of `high`
  };

  FASTSEG_HOST_DEVICE Taps<4> sample_both(int pixel) const {
    const Pair middle = interpolate(input, last_step, pixel);
    const Pair low = interpolate(source, step, middle.low), high = interpolate(source, step, middle.high);
    const double low_share = 1 - middle.share;
    return {{low.low, low.high, high.low, high.high},
            {static_cast<float>(multiply(low_share, 1 - low.share)), static_cast<float>(multiply(low_share, low.share)),
             static_cast<float>(multiply(middle.share, 1 - high.share)),
             static_cast<float>(multiply(middle.share, high.share))}};
  }

  FASTSEG_HOST_DEVICE Taps<2> sample_single(int pixel) const {
    const Pair at = source == padded ? interpolate(input, last_step, pixel) : interpolate(source, step, pixel);
    return {{at.low, at.high}, {static_cast<float>(1 - at.share), static_cast<float>(at.share)}};
  }

  FASTSEG_HOST_DEVICE static Pair interpolate(int from, double step, int pixel) {
    const double place = ::fmax(multiply(pixel + 0.5, step) - 0.5, 0.0);
    const int low = place < from - 1 ? static_cast<int>(place) : from - 1;
    return {low, low + 1 < from ? low + 1 : from - 1, ::fmin(place - low, 1.0)};
  }
};

}  // namespace fastseg::paste_masks
