// Shared by the elementwise sigmoid losses: flat tensors of any dtype, read and written in chunks of the accumulator
// type, and the sigmoid with its logarithm.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "fastseg/check.h"
#include "fastseg/parallel.h"
#include "fastseg/simd.h"

namespace fastseg {

constexpr int kChunk = 512;  // elements handled at a time: a few chunks stay in the first-level cache

// A contiguous tensor that is read (or written) in chunks.
struct FlatView {
  void* data = nullptr;
  torch::headeronly::ScalarType type = torch::headeronly::ScalarType::Float;

  explicit operator bool() const { return data != nullptr; }
};

inline FlatView flat_view(const torch::stable::Tensor& tensor, int64_t count, const char* name) {
  FASTSEG_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == count, name,
                " must be a contiguous CPU tensor of ", count, " elements");
  return {tensor.data_ptr(), tensor.scalar_type()};
}

inline UnevenSlices chunk_slices(int64_t chunks) { return UnevenSlices(chunks, 16); }

// Calls body(slice, offset, count) for every chunk of [0, count); `slices` divides the chunks among threads.
template <typename Body>
void for_each_chunk(int64_t count, const UnevenSlices& slices, const Body& body) {
  slices.run([&](int64_t slice, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t offset = chunk * kChunk;
      body(slice, offset, static_cast<int>(std::min<int64_t>(kChunk, count - offset)));
    }
    simd::stream_fence();
  });
}

namespace detail {

template <typename scalar_t, typename accumulate_t>
void convert(const void* from, int64_t offset, int count, accumulate_t* to) {
  const scalar_t* values = static_cast<const scalar_t*>(from) + offset;
  int i = 0;
  if constexpr (std::is_same_v<simd::accumulate<scalar_t>, accumulate_t> && std::is_floating_point_v<accumulate_t> &&
                !std::is_integral_v<scalar_t>) {
    for (; i + simd::kLanes <= count; i += simd::kLanes) simd::store(to + i, simd::load(values + i));
  }
  for (; i < count; ++i) to[i] = static_cast<accumulate_t>(values[i]);
}

template <typename scalar_t, typename accumulate_t>
void round_to(const accumulate_t* from, int count, void* to, int64_t offset) {
  scalar_t* values = static_cast<scalar_t*>(to) + offset;
  int i = 0;
  if constexpr (std::is_same_v<simd::accumulate<scalar_t>, accumulate_t>) {
    const bool streaming = reinterpret_cast<uintptr_t>(values) % (simd::kLanes * sizeof(scalar_t)) == 0;
    for (; i + simd::kLanes <= count; i += simd::kLanes) {
      if (streaming) {
        simd::stream(values + i, simd::load(from + i));
      } else {
        simd::store(values + i, simd::load(from + i));
      }
    }
  }
  for (; i < count; ++i) values[i] = static_cast<scalar_t>(from[i]);
}

}  // namespace detail

// Elements [offset, offset + count) in the accumulator type: in the tensor if that is its type and the chunk is whole
// vectors, else in `buffer` [kChunk], filled up to whole vectors with `padding`.
template <typename accumulate_t>
const accumulate_t* read_chunk(FlatView from, int64_t offset, int count, accumulate_t padding, accumulate_t* buffer) {
  using torch::headeronly::ScalarType;
  constexpr ScalarType kOwn = sizeof(accumulate_t) == 4 ? ScalarType::Float : ScalarType::Double;
  if (from.type == kOwn && count % simd::kLanes == 0) return static_cast<const accumulate_t*>(from.data) + offset;
  switch (from.type) {
    case ScalarType::Float: detail::convert<float>(from.data, offset, count, buffer); break;
    case ScalarType::Double: detail::convert<double>(from.data, offset, count, buffer); break;
    case ScalarType::Half: detail::convert<simd::Half>(from.data, offset, count, buffer); break;
    case ScalarType::BFloat16: detail::convert<simd::BFloat16>(from.data, offset, count, buffer); break;
    case ScalarType::Int: detail::convert<int32_t>(from.data, offset, count, buffer); break;
    case ScalarType::Long: detail::convert<int64_t>(from.data, offset, count, buffer); break;
    default:  // bool and uint8
      detail::convert<uint8_t>(from.data, offset, count, buffer);
  }
  const int whole = static_cast<int>(ceil_divide(count, simd::kLanes)) * simd::kLanes;
  std::fill(buffer + count, buffer + whole, padding);
  return buffer;
}

// Rounds `values` [count] to elements [offset, offset + count). Call simd::stream_fence() after the last chunk.
template <typename accumulate_t>
void write_chunk(const accumulate_t* values, int count, FlatView to, int64_t offset) {
  using torch::headeronly::ScalarType;
  switch (to.type) {
    case ScalarType::Float: return detail::round_to<float>(values, count, to.data, offset);
    case ScalarType::Double: return detail::round_to<double>(values, count, to.data, offset);
    case ScalarType::Half: return detail::round_to<simd::Half>(values, count, to.data, offset);
    default: return detail::round_to<simd::BFloat16>(values, count, to.data, offset);
  }
}

// p = sigmoid(z) and q = 1 - p, both to the last digits of scalar_t, and -log p = hinge + log_term, with
// hinge = max(-z, 0) and log_term = log(1 + e^-|z|). They stay separate so that z + hinge is exactly 0 for z < 0, where
// the loss of a negative is the log term alone.
template <typename scalar_t>
struct Sigmoid {
  using vector_t = simd::vec<simd::accumulate<scalar_t>>;
  vector_t p, q, hinge, log_term;

  FASTSEG_INLINE explicit Sigmoid(vector_t z) {
    const vector_t zero{};
    const vector_t lower = simd::select(z < zero, z, -z);
    const vector_t small = sizeof(scalar_t) == 2 ? simd::exp_of_logits<scalar_t>(lower) : simd::exp(lower);
    const vector_t one_plus = 1 + small;
    const vector_t inverse = 1 / one_plus;
    p = simd::select(z < zero, small * inverse, inverse);
    q = simd::select(z < zero, inverse, small * inverse);
    hinge = simd::select(z < zero, -z, zero);
    if constexpr (sizeof(scalar_t) == 2) {
      log_term = log_one_plus(small);
    } else {  // the second term corrects the rounding of one_plus
      log_term = simd::log_finite(one_plus) + (small - (one_plus - 1)) * inverse;
    }
  }

 private:
  // log(1 + small) for small in [0, 1] by a polynomial of least relative error, 1e-5.
  FASTSEG_INLINE static vector_t log_one_plus(vector_t small) {
    vector_t r = small * -2.4734541e-2f + 1.0359264e-1f;
    r = r * small - 2.1240421e-1f;
    r = r * small + 3.2622608e-1f;
    r = r * small - 4.9953947e-1f;
    r = r * small + 1.0f;
    return small * r;
  }
};

// Calls fn with the type whose digits the result needs: double(), float(), or simd::BFloat16() for both half types.
// Half logits with a target of another floating type promote, as in stock PyTorch.
template <typename Function>
auto with_digits_of(FlatView logits, FlatView target, const Function& fn) {
  using torch::headeronly::ScalarType;
  const auto is = [&](ScalarType type) { return target.type == type; };
  const bool integer = is(ScalarType::Bool) || is(ScalarType::Byte) || is(ScalarType::Int) || is(ScalarType::Long);
  if (logits.type == ScalarType::Double) return fn(double());
  if (logits.type == ScalarType::Float || !(integer || is(logits.type))) return fn(float());
  return fn(simd::BFloat16());
}

// Sums of vectors: fp32 over a few of them, fp64 from there on.
template <typename vector_t>
class LongSum {
 public:
  FASTSEG_INLINE void add(vector_t partial) { lanes_ += simd::convert<simd::f64x16>(partial); }
  FASTSEG_INLINE double total() const { return simd::reduce_add(lanes_); }

 private:
  simd::f64x16 lanes_{};
};

}  // namespace fastseg
