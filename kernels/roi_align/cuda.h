// Launchers of cuda.cu, free of torch: instantiated there for float, c10::Half and c10::BFloat16.
#pragma once

#include "cuda/cuda_compat.h"

namespace fastseg::cuda {

constexpr int most_levels = 5;

// A dense tensor [N, C, H, W] of either memory format.
template <typename element_t>
struct MapView {
  element_t* data;
  int height, width;
  bool interleaved;  // stored as [N, H, W, C]

  __host__ __device__ int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  __host__ __device__ int64_t channel_step(int) const { return interleaved ? 1 : pixels(); }
  __host__ __device__ int64_t pixel_step(int channels) const { return interleaved ? channels : 1; }
};

// Feature maps of one pyramid, all with N images of C channels.
template <typename element_t>
struct Pyramid {
  MapView<element_t> maps[most_levels];
  float scales[most_levels];
  double areas[most_levels];  // areas[l]: the least area of a box of level l + 1
  int levels, images, channels;
};

// Parameters of all boxes of a call.
struct BoxSampling {
  int64_t boxes;
  int sampling_ratio;  // 0: as many samples as a bin has cells
  bool aligned;
};

// The mean of the samples in each bin; 0 for boxes whose image does not exist.
template <typename scalar_t>
cudaError_t launch_roi_align_forward(const Pyramid<const scalar_t>& input,
                                     const float* boxes,               // [K, 5]
                                     const MapView<scalar_t>& output,  // [K, C, PH, PW]
                                     const BoxSampling& sampling, cudaStream_t stream);

// Writes every cell of every level once: the sum, in the order of the boxes, over the bins that read it.
template <typename scalar_t>
cudaError_t launch_roi_align_backward(const MapView<const scalar_t>& grad_output,  // [K, C, PH, PW]
                                      const float* boxes,                          // [K, 5]
                                      const Pyramid<scalar_t>& grad_input, const BoxSampling& sampling,
                                      cudaStream_t stream);

}  // namespace fastseg::cuda
