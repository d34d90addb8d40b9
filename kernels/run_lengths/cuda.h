// Launchers of cuda.cu, free of torch.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

struct RowMasks {
  const unsigned* words;                  // [count, height, pitch]
  const Box* boxes;                       // [count]
  long long count, height, width, pitch;  // less than 2^31 pixels a mask
};

cudaError_t launch_count_runs(const RowMasks& masks,
                              long long* runs,  // [count]
                              cudaStream_t stream);

cudaError_t launch_run_lengths(const RowMasks& masks,
                               const long long* ends,  // [count], of the counts of each mask
                               long long total,
                               long long* places,  // [total], scratch
                               long long* counts,  // [total]
                               cudaStream_t stream);

}  // namespace fastseg::cuda
