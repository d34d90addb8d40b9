// Launcher of cuda.cu, free of torch: instantiated there for float and double.
#pragma once

#include "cuda/cuda_compat.h"
#include "soft_nms/math.h"

namespace fastseg::cuda {

// Soft-NMS of `count` boxes, fewer than 2^31.
template <typename real_t>
cudaError_t launch_soft_nms(const real_t* boxes,     // [count, 4], aligned to 16 bytes
                            const real_t* scores,    // [count]
                            const int64_t* classes,  // [count], or null for a single class
                            int64_t count, soft_nms::Decay<real_t> by, double min_score,
                            real_t* current,  // scratch: [count]
                            int64_t most,
                            int64_t* indices,       // [most]
                            real_t* picked_scores,  // [most]
                            int64_t* found,         // [1]
                            cudaStream_t stream);

}  // namespace fastseg::cuda
