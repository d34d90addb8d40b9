// Greedy suppression of packed masks on CUDA: all pairs that boxes and areas do not decide are compared, 32 to a word
// of bits; one block then walks through the ranking. See README.md.
#include "mask_nms/cuda.h"

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

constexpr int sweep_threads = 1024;

__global__ void __launch_bounds__(mask_threads)
    find_suppressed_kernel(KnownMasks masks, const long long* __restrict__ order, const long long* __restrict__ labels,
                           double threshold, unsigned* __restrict__ suppressed) {  // [count, tiles]
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const long long tiles = (masks.count + warpSize - 1) / warpSize;
  for (long long item = warp_of_grid(); item < masks.count * tiles; item += warps_of_grid()) {
    const long long row = item / tiles, first = item % tiles * warpSize, place = first + lane;
    if (first + warpSize <= row) continue;  // the sweep never reads these
    const long long i = ranked(order, row, masks.count);
    const Box box = masks.boxes[i];
    const long long area = masks.areas[i];
    // An upper bound of the IoU, which grows with the intersection, decides most pairs.
    bool open = false;
    long long j = 0;
    if (place > row && place < masks.count) {
      j = ranked(order, place, masks.count);
      const long long areas = area + masks.areas[j];
      const long long most = min(min(area, masks.areas[j]), Overlap(box, masks.boxes[j], masks).pixels);
      open = (labels == nullptr || labels[i] == labels[j]) && ratio(most, areas - most) > threshold;
    }
    unsigned found = 0;
    for (unsigned left = __ballot_sync(all_lanes, open); left != 0; left &= left - 1) {
      const int other = __ffs(static_cast<int>(left)) - 1;
      const long long candidate = __shfl_sync(all_lanes, j, other);
      const Overlap at(box, masks.boxes[candidate], masks);
      const long long common = intersection(masks.mask(i), masks.mask(candidate), at, masks.pitch);
      if (ratio(common, area + masks.areas[candidate] - common) > threshold) found |= 1u << other;
    }
    if (lane == 0) suppressed[item] = found;
  }
}

__global__ void __launch_bounds__(sweep_threads)
    sweep_kernel(const unsigned* __restrict__ suppressed, const long long* __restrict__ order, long long masks,
                 long long room, unsigned* removed, long long* __restrict__ keep, long long* __restrict__ count) {
  FASTSEG_SHARED(unsigned, kept_of_tile, [1]);
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const long long tiles = (masks + warpSize - 1) / warpSize;
  for (long long tile = threadIdx.x; tile < tiles; tile += blockDim.x) removed[tile] = 0;
  __syncthreads();
  long long number = 0;  // of masks kept so far, the same for all threads
  for (long long tile = 0; tile < tiles && number < room; ++tile) {
    const long long first = tile * warpSize;
    if (threadIdx.x < warpSize) {
      const bool inside = first + lane < masks;
      const unsigned own = inside ? suppressed[(first + lane) * tiles + tile] : 0;
      const unsigned members = __ballot_sync(all_lanes, inside);
      unsigned gone = removed[tile], kept = 0;
      for (int b = 0; b < warpSize; ++b) {
        const unsigned row = __shfl_sync(all_lanes, own, b);
        if ((members & ~gone) >> b & 1 && number + __popc(kept) < room) {
          kept |= 1u << b;
          gone |= row;
        }
      }
      if (kept >> lane & 1) keep[number + __popc(kept & ((1u << lane) - 1))] = order[first + lane];
      if (lane == 0) kept_of_tile[0] = kept;
    }
    __syncthreads();
    const unsigned kept = kept_of_tile[0];
    number += __popc(kept);
    for (long long later = tile + 1 + threadIdx.x; later < tiles; later += blockDim.x) {
      unsigned gone = removed[later];
      for (unsigned left = kept; left != 0; left &= left - 1) {
        gone |= suppressed[(first + __ffs(static_cast<int>(left)) - 1) * tiles + later];
      }
      removed[later] = gone;
    }
    __syncthreads();  // kept_of_tile and removed have been read
  }
  for (long long place = number + threadIdx.x; place < room; place += blockDim.x) keep[place] = -1;
  if (threadIdx.x == 0) count[0] = number;
}

}  // namespace

cudaError_t launch_find_suppressed(const KnownMasks& masks, const long long* order, const long long* labels,
                                   double iou_threshold, unsigned* suppressed, cudaStream_t stream) {
  const unsigned blocks = blocks_for_warps(masks.count * ((masks.count + 31) / 32));
  FASTSEG_LAUNCH(find_suppressed_kernel, dim3(blocks), dim3(mask_threads), 0, stream, masks, order, labels,
                 iou_threshold, suppressed);
  return cudaGetLastError();
}

cudaError_t launch_sweep(const unsigned* suppressed, const long long* order, long long masks, long long room,
                         unsigned* removed, long long* keep, long long* count, cudaStream_t stream) {
  FASTSEG_LAUNCH(sweep_kernel, dim3(1), dim3(sweep_threads), 0, stream, suppressed, order, masks, room, removed, keep,
                 count);
  return cudaGetLastError();
}

}  // namespace fastseg::cuda
