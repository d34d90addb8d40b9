// Launchers of cuda.cu, free of torch.
#pragma once

#include "cuda/known_masks.h"

namespace fastseg::cuda {

// Bit b of word t of row r: the mask ranked r suppresses the mask ranked 32 t + b, which comes later.
cudaError_t launch_find_suppressed(const KnownMasks& masks,
                                   const long long* order,   // [count], best first
                                   const long long* labels,  // [count] or null
                                   double iou_threshold,
                                   unsigned* suppressed,  // [count, ceil(count / 32)]
                                   cudaStream_t stream);

// The masks that no mask kept before them suppresses, at most `room`; keep is padded with -1.
cudaError_t launch_sweep(const unsigned* suppressed,  // [count, ceil(count / 32)]
                         const long long* order,      // [count]
                         long long masks, long long room,
                         unsigned* removed,  // [ceil(count / 32)], scratch
                         long long* keep,    // [room]
                         long long* count,   // []
                         cudaStream_t stream);

}  // namespace fastseg::cuda
