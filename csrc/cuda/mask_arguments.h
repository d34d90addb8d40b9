// Turns the tensors of packed masks into the structs of known_masks.h. Checks only what memory safety needs, and never
// data: kernels stay inside the masks whatever the boxes and indices are.
#pragma once

#include "cuda/host.h"
#include "cuda/known_masks.h"

namespace fastseg::cuda {

inline void check_words(const char* op, const Tensor& words) {
  check_device(words, op, "words");
  FASTSEG_CHECK(words.dim() == 3 && words.is_contiguous() && words.scalar_type() == ScalarType::Int, "fastseg::", op,
                ": words must be contiguous int32 [N, H, words]");
  FASTSEG_CHECK(words.size(1) * words.size(2) < int64_t{1} << 27, "fastseg::", op, ": masks of 2^32 pixels or more");
}

inline const unsigned* words_of(const Tensor& words) {
  return reinterpret_cast<const unsigned*>(words.const_data_ptr<int32_t>());
}

inline KnownMasks known_masks(const char* op, const Tensor& words, const Tensor& area, const Tensor& boxes) {
  check_words(op, words);
  const int64_t count = words.size(0);
  check_list(op, words, area, "area", ScalarType::Long, count);
  check_list(op, words, boxes, "boxes", ScalarType::Int, 4 * count);
  return {words_of(words),
          reinterpret_cast<const long long*>(area.const_data_ptr<int64_t>()),
          reinterpret_cast<const Box*>(boxes.const_data_ptr<int32_t>()),
          count,
          words.size(1),
          words.size(2)};
}

inline long long* long_output(const Tensor& tensor) {
  return reinterpret_cast<long long*>(tensor.mutable_data_ptr<int64_t>());
}
inline const long long* longs_of(const Tensor& tensor) {
  return reinterpret_cast<const long long*>(tensor.const_data_ptr<int64_t>());
}

}  // namespace fastseg::cuda
