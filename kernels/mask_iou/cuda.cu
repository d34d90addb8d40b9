// IoU of packed masks on CUDA: a warp takes a mask of a and 32 of b. Each lane compares the boxes of a pair; then all
// lanes together compare the words of each pair whose boxes overlap. See README.md.
#include "mask_iou/cuda.h"

#include <type_traits>

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

// value_t: float, or int64_t for the intersection alone.
template <typename value_t>
__device__ value_t iou_of(const KnownMasks& a, const KnownMasks& b, const IouOptions& options, long long i, long long j,
                          long long common) {
  if constexpr (std::is_same_v<value_t, int64_t>) return common;
  const long long area_a = a.areas[i], area_b = b.areas[j];
  long long whole = options.over_smaller ? min(area_a, area_b) : area_a + area_b - common;
  if (options.crowd != nullptr && options.crowd[j]) whole = area_a;
  return static_cast<value_t>(ratio(common, whole));
}

template <typename value_t>
__global__ void __launch_bounds__(mask_threads)
    mask_iou_kernel(KnownMasks a, KnownMasks b, IouOptions options, value_t* __restrict__ iou) {  // [a.count, b.count]
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const long long groups = (b.count + warpSize - 1) / warpSize;
  for (long long item = warp_of_grid(); item < a.count * groups; item += warps_of_grid()) {
    const long long i = item / groups, first = item % groups * warpSize, j = first + lane;
    if (options.symmetric && first + warpSize <= i) continue;
    const bool wanted = j < b.count && !(options.symmetric && j < i);
    const Box box = a.boxes[i];
    const bool other_label = wanted && options.labels != nullptr && options.labels[i] != options.labels[j];
    const bool overlaps = wanted && !other_label && Overlap(box, b.boxes[j], a).rows > 0;
    long long common = 0;
    for (unsigned left = __ballot_sync(all_lanes, overlaps); left != 0; left &= left - 1) {
      const int other = __ffs(static_cast<int>(left)) - 1;
      const Overlap at(box, b.boxes[first + other], a);
      const unsigned count = intersection(a.mask(i), b.mask(first + other), at, a.pitch);
      if (lane == other) common = count;
    }
    if (!wanted) continue;
    const value_t value = iou_of<value_t>(a, b, options, i, j, common);
    iou[i * b.count + j] = value;
    if (options.symmetric) iou[j * b.count + i] = value;
  }
}

template <typename value_t>
__global__ void __launch_bounds__(mask_threads)
    mask_iou_of_pairs_kernel(KnownMasks a, KnownMasks b, IouOptions options, value_t* __restrict__ iou) {  // [a.count]
  for (long long i = warp_of_grid(); i < a.count; i += warps_of_grid()) {
    const unsigned common = intersection(a.mask(i), b.mask(i), Overlap(a.boxes[i], b.boxes[i], a), a.pitch);
    if (threadIdx.x % warpSize == 0) iou[i] = iou_of<value_t>(a, b, options, i, i, common);
  }
}

}  // namespace

template <typename value_t>
cudaError_t launch_mask_iou(const KnownMasks& a, const KnownMasks& b, const IouOptions& options, value_t* iou,
                            cudaStream_t stream) {
  const unsigned blocks = blocks_for_warps(a.count * ((b.count + 31) / 32));
  FASTSEG_LAUNCH(mask_iou_kernel<value_t>, dim3(blocks), dim3(mask_threads), 0, stream, a, b, options, iou);
  return cudaGetLastError();
}

template <typename value_t>
cudaError_t launch_mask_iou_of_pairs(const KnownMasks& a, const KnownMasks& b, const IouOptions& options, value_t* iou,
                                     cudaStream_t stream) {
  const dim3 blocks(blocks_for_warps(a.count));
  FASTSEG_LAUNCH(mask_iou_of_pairs_kernel<value_t>, blocks, dim3(mask_threads), 0, stream, a, b, options, iou);
  return cudaGetLastError();
}

template cudaError_t launch_mask_iou(const KnownMasks&, const KnownMasks&, const IouOptions&, float*, cudaStream_t);
template cudaError_t launch_mask_iou(const KnownMasks&, const KnownMasks&, const IouOptions&, int64_t*, cudaStream_t);
template cudaError_t launch_mask_iou_of_pairs(const KnownMasks&, const KnownMasks&, const IouOptions&, float*,
                                              cudaStream_t);
template cudaError_t launch_mask_iou_of_pairs(const KnownMasks&, const KnownMasks&, const IouOptions&, int64_t*,
                                              cudaStream_t);

}  // namespace fastseg::cuda
