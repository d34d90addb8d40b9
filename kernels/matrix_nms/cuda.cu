// The decay of scores by Matrix NMS on CUDA: a warp takes a mask and loops over the masks before it. See README.md.
#include "matrix_nms/cuda.h"

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

// The IoU of the masks ranked i and j; 0 if their labels differ.
__device__ float overlap(const Ranking& ranking, long long i, long long j) {
  const long long a = ranked(ranking.order, i, ranking.count), b = ranked(ranking.order, j, ranking.count);
  const bool differ = ranking.labels != nullptr && ranking.labels[a] != ranking.labels[b];
  return differ ? 0.0f : ranking.iou[a * ranking.count + b];
}

__device__ float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(all_lanes, value, lanes));
  return value;
}

__global__ void __launch_bounds__(mask_threads)
    find_covered_kernel(Ranking ranking, float* __restrict__ covered) {  // [count]
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long j = warp_of_grid(); j < ranking.count; j += warps_of_grid()) {
    float most = 0;
    for (long long i = lane; i < j; i += warpSize) most = max(most, overlap(ranking, i, j));
    most = warp_max(most);
    if (lane == 0) covered[j] = most;
  }
}

__global__ void __launch_bounds__(mask_threads)
    matrix_decay_kernel(Ranking ranking, bool gaussian, float sigma, const float* __restrict__ covered,  // [count]
                        float* __restrict__ decay) {                                                     // [count]
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long j = warp_of_grid(); j < ranking.count; j += warps_of_grid()) {
    float most = 0, least = 1;
    for (long long i = lane; i < j; i += warpSize) {
      const float o = overlap(ranking, i, j), c = covered[i];
      most = max(most, o * o - c * c);
      if (c < 1) least = min(least, (1 - o) / (1 - c));
    }
    most = warp_max(most);
    least = -warp_max(-least);
    if (lane == 0) decay[j] = gaussian ? expf(-sigma * most) : least;
  }
}

}  // namespace

cudaError_t launch_matrix_decay(const Ranking& ranking, bool gaussian, float sigma, float* covered, float* decay,
                                cudaStream_t stream) {
  const dim3 blocks(blocks_for_warps(ranking.count)), threads(mask_threads);
  FASTSEG_LAUNCH(find_covered_kernel, blocks, threads, 0, stream, ranking, covered);
  FASTSEG_LAUNCH(matrix_decay_kernel, blocks, threads, 0, stream, ranking, gaussian, sigma, covered, decay);
  return cudaGetLastError();
}

}  // namespace fastseg::cuda
