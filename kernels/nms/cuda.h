// Launcher of cuda.cu, free of torch: instantiated there for float and double.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

constexpr int nms_tile = 64;            // boxes per word of bits
constexpr int64_t nms_strip = 64 * 64;  // boxes whose bits are kept at a time

__host__ __device__ inline int64_t nms_words(int64_t boxes) { return (boxes + nms_tile - 1) / nms_tile; }

// Greedy NMS of `count` boxes, fewer than 2^31; `order` lists the best first.
template <typename real_t>
cudaError_t launch_nms(const real_t* boxes,     // [count, 4]
                       const int64_t* order,    // [count]
                       const int64_t* classes,  // [count], or null for a single class
                       int64_t count, double iou_threshold,
                       real_t* sorted,               // scratch: [count, 4], aligned to 16 bytes
                       int64_t* sorted_classes,      // scratch: [count], null if `classes` is
                       unsigned long long* bits,     // scratch: [min(count, nms_strip), nms_words(count)]
                       unsigned long long* removed,  // scratch: [nms_words(count)]
                       int64_t most,
                       int64_t* indices,  // [most]
                       int64_t* found,    // [1]
                       cudaStream_t stream);

}  // namespace fastseg::cuda
