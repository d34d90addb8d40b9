// Area and tight box of packed masks on CUDA: a block reads a mask. See README.md.
#include "masks_to_boxes/cuda.h"

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

constexpr int warps = mask_threads / 32;
constexpr int far = 0x7fffffff;

struct Statistics {
  unsigned long long area;
  Box box;

  __device__ void add(const Statistics& other) {
    area += other.area;
    box = {min(box.x1, other.box.x1), min(box.y1, other.box.y1), max(box.x2, other.box.x2), max(box.y2, other.box.y2)};
  }
};

__device__ Statistics of_warp(Statistics own) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    own.add({__shfl_xor_sync(all_lanes, own.area, lanes),
             {__shfl_xor_sync(all_lanes, own.box.x1, lanes), __shfl_xor_sync(all_lanes, own.box.y1, lanes),
              __shfl_xor_sync(all_lanes, own.box.x2, lanes), __shfl_xor_sync(all_lanes, own.box.y2, lanes)}});
  }
  return own;
}

__global__ void __launch_bounds__(mask_threads)
    mask_statistics_kernel(const unsigned* __restrict__ words,  // [masks, height, pitch]
                           long long masks, long long height, long long pitch,
                           long long* __restrict__ area,  // [masks]
                           Box* __restrict__ boxes) {     // [masks]
  FASTSEG_SHARED(Statistics, of_warps, [warps]);
  const int warp = static_cast<int>(threadIdx.x) / warpSize, lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long n = blockIdx.x; n < masks; n += gridDim.x) {
    Statistics own{0, {far, far, 0, 0}};
    for (int y = warp; y < height; y += warps) {
      const unsigned* row = words + (n * height + y) * pitch;
      for (int w = lane; w < pitch; w += warpSize) {
        const unsigned bits = row[w];
        if (bits == 0) continue;
        const int x = w * mask_word;
        own.add({static_cast<unsigned long long>(__popc(bits)),
                 {x + __ffs(static_cast<int>(bits)) - 1, y, x + mask_word - __clz(static_cast<int>(bits)), y + 1}});
      }
    }
    own = of_warp(own);
    if (lane == 0) of_warps[warp] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < warps; ++other) own.add(of_warps[other]);
      area[n] = static_cast<long long>(own.area);
      boxes[n] = own.area == 0 ? Box{0, 0, 0, 0} : own.box;
    }
    __syncthreads();  // of_warps has been read
  }
}

}  // namespace

cudaError_t launch_mask_statistics(const unsigned* words, long long masks, long long height, long long pitch,
                                   long long* area, Box* boxes, cudaStream_t stream) {
  FASTSEG_LAUNCH(mask_statistics_kernel, dim3(blocks_for(masks)), dim3(mask_threads), 0, stream, words, masks, height,
                 pitch, area, boxes);
  return cudaGetLastError();
}

}  // namespace fastseg::cuda
