// Launcher of cuda.cu, free of torch.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

struct Ranking {
  const float* iou;         // [count, count]
  const long long* order;   // [count], best first
  const long long* labels;  // [count] or null
  long long count;
};

cudaError_t launch_matrix_decay(const Ranking& ranking, bool gaussian, float sigma,
                                float* covered,  // [count], scratch
                                float* decay,    // [count], in that order
                                cudaStream_t stream);

}  // namespace fastseg::cuda
