// Launchers of cuda.cu, free of torch: instantiated there for every pair of types the op allows.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

// Adds to `counts` the pairs (true label, predicted label) of every pixel whose two labels lie in [0,
// classes) and whose true label is not ignore_index.
template <typename prediction_t, typename target_t>
cudaError_t launch_confusion_matrix_of_labels(const prediction_t* prediction,  // [pixels]
                                              const target_t* target,          // [pixels]
                                              int64_t pixels, int classes, int64_t ignore_index,
                                              unsigned long long* counts,  // [classes, classes]
                                              cudaStream_t stream);

// The same with the arg max over the classes as prediction: the first maximum, NaN above every number.
template <typename scalar_t, typename target_t>
cudaError_t launch_confusion_matrix_of_logits(const scalar_t* logits,  // [images, classes, plane], or
                                                                       // [images, plane, classes] if channels_last
                                              const target_t* target,  // [images, plane]
                                              int64_t images, int64_t plane, int classes, bool channels_last,
                                              int64_t ignore_index,
                                              unsigned long long* counts,  // [classes, classes]
                                              cudaStream_t stream);

}  // namespace fastseg::cuda
