// Soft-NMS on CUDA: one block picks box after box. See README.md.
#include "soft_nms/cuda.h"

#include "nms/cuda_overlap.h"

namespace fastseg::cuda {
namespace {

constexpr int pick_threads = 512;
constexpr int pick_warps = pick_threads / 32;

// The next box to pick: the lowest key (nms/math.h), of equal keys the lowest index. `index` < 0: none.
template <typename real_t>
struct Candidate {
  nms::score_key_t<real_t> key;
  int index;

  __device__ void offer(const Candidate& other) {
    const bool is_better = other.key != key ? other.key < key : other.index < index;
    if (other.index >= 0 && (index < 0 || is_better)) *this = other;
  }

  // The best of the warp, on every lane.
  __device__ void reduce_warp() {
    for (int step = 16; step > 0; step /= 2) {
      offer({__shfl_xor_sync(~0u, key, step), __shfl_xor_sync(~0u, index, step)});
    }
  }
};

// `current` holds the decayed scores, -1 for a box that is picked or dropped. A thread takes every 512th box and is the
// only one to read and write its scores.
template <typename real_t>
__global__ void __launch_bounds__(pick_threads) soft_nms_kernel(const real_t* __restrict__ boxes,     // [count, 4]
                                                                const real_t* __restrict__ scores,    // [count]
                                                                const int64_t* __restrict__ classes,  // [count] or null
                                                                int count, soft_nms::Decay<real_t> by, double min_score,
                                                                real_t* __restrict__ current,  // [count]
                                                                int64_t most,
                                                                int64_t* __restrict__ indices,       // [most]
                                                                real_t* __restrict__ picked_scores,  // [most]
                                                                int64_t* __restrict__ found) {
  FASTSEG_SHARED(Candidate<real_t>, of_warps, [pick_warps]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int i = thread; i < count; i += pick_threads) current[i] = scores[i] < min_score ? real_t(-1) : scores[i];
  Corners<real_t> picked{};
  int64_t kind = 0, place = 0;
  for (; place < most; ++place) {
    const real_t area = area_of(picked);
    Candidate<real_t> best{0, -1};
    for (int i = thread; i < count; i += pick_threads) {
      real_t score = current[i];
      if (score < real_t(0)) continue;
      if (place > 0 && (classes == nullptr || classes[i] == kind)) {
        const auto box = load_pack<4>(boxes + 4 * static_cast<int64_t>(i));
        const real_t shared = overlap(picked, area, box, area_of(box));
        if (shared > by.threshold) {
          score = by.decayed(score, shared);
          if (score < min_score) score = real_t(-1);
          current[i] = score;
          if (score < real_t(0)) continue;
        }
      }
      best.offer({nms::score_key(score), i});
    }
    best.reduce_warp();
    __syncthreads();  // `of_warps` has been read
    if (lane == 0) of_warps[thread / 32] = best;
    __syncthreads();
    best = of_warps[lane % pick_warps];
    best.reduce_warp();
    if (best.index < 0) break;
    picked = load_pack<4>(boxes + 4 * static_cast<int64_t>(best.index));
    if (classes != nullptr) kind = classes[best.index];
    if (best.index % pick_threads == thread) {
      indices[place] = best.index;
      picked_scores[place] = current[best.index];
      current[best.index] = real_t(-1);
    }
  }
  for (int64_t i = place + thread; i < most; i += pick_threads) {
    indices[i] = -1;
    picked_scores[i] = real_t(0);
  }
  if (thread == 0) *found = place;
}

}  // namespace

template <typename real_t>
cudaError_t launch_soft_nms(const real_t* boxes, const real_t* scores, const int64_t* classes, int64_t count,
                            soft_nms::Decay<real_t> by, double min_score, real_t* current, int64_t most,
                            int64_t* indices, real_t* picked_scores, int64_t* found, cudaStream_t stream) {
  FASTSEG_LAUNCH(soft_nms_kernel<real_t>, dim3(1), dim3(pick_threads), 0, stream, boxes, scores, classes,
                 static_cast<int>(count), by, min_score, current, most, indices, picked_scores, found);
  return cudaGetLastError();
}

#define INSTANTIATE(real_t)                                                                                            \
  template cudaError_t launch_soft_nms(const real_t*, const real_t*, const int64_t*, int64_t, soft_nms::Decay<real_t>, \
                                       double, real_t*, int64_t, int64_t*, real_t*, int64_t*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastseg::cuda
