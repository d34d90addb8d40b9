// Run lengths of packed masks on CUDA: a block takes a mask, a warp 32 columns, a lane one column. See README.md.
#include "run_lengths/cuda.h"

#include "cuda/packed_masks.h"

namespace fastseg::cuda {
namespace {

constexpr int warps = mask_threads / 32;

// A mask, and the part of it where pixels can differ from those before them in column order.
struct Part {
  const unsigned* mask;  // [height, pitch]
  int height, width, pitch;
  int first_word, words;  // of a row; none for an empty mask
  int first_row, end_row;

  __device__ Part(const RowMasks& masks, long long n)
      : mask(masks.words + n * masks.height * masks.pitch), height(static_cast<int>(masks.height)),
        width(static_cast<int>(masks.width)), pitch(static_cast<int>(masks.pitch)) {
    const Box box = masks.boxes[n];
    const bool empty = box.x1 >= box.x2 || box.y1 >= box.y2 || height == 0;
    first_word = max(box.x1, 0) / mask_word;
    words = empty ? 0 : max(0, min(box.x2 / mask_word + 1, pitch) - first_word);  // includes the pixel after the box
    first_row = max(box.y1, 1);
    end_row = min(box.y2, height - 1) + 1;
  }

  // The pixels of word w in row y that differ from the one above, in row 0 from the last one of the column to the left.
  __device__ unsigned changes(int y, int w) const {
    const long long at = static_cast<long long>(y) * pitch + w;
    if (y > 0) return mask[at] ^ mask[at - pitch];
    const unsigned* bottom = mask + static_cast<long long>(height - 1) * pitch;
    const unsigned left = bottom[w] << 1 | (w > 0 ? bottom[w - 1] >> (mask_word - 1) : 0);
    const int inside = width - w * mask_word;
    return (mask[w] ^ left) & (inside < mask_word ? (1u << inside) - 1 : ~0u);
  }
};

__global__ void __launch_bounds__(mask_threads)
    count_runs_kernel(RowMasks masks, long long* __restrict__ runs) {  // [count]
  FASTSEG_SHARED(unsigned, of_warps, [warps]);
  const int warp = static_cast<int>(threadIdx.x) / warpSize, lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long n = blockIdx.x; n < masks.count; n += gridDim.x) {
    const Part part(masks, n);
    unsigned changes = 0;
    for (int y = part.first_row - 1 + warp; y < part.end_row; y += warps) {
      const int row = y < part.first_row ? 0 : y;  // warp 0 begins with row 0
      for (int w = lane; w < part.words; w += warpSize) changes += __popc(part.changes(row, part.first_word + w));
    }
    changes = __reduce_add_sync(all_lanes, changes);
    if (lane == 0) of_warps[warp] = changes;
    __syncthreads();
    if (threadIdx.x == 0) {
      long long sum = 1;
      for (int other = 0; other < warps; ++other) sum += of_warps[other];
      runs[n] = sum;
    }
    __syncthreads();  // of_warps has been read
  }
}

// Calls body(y) for the rows where this lane's column of word w changes.
template <typename Body>
__device__ void for_each_change(const Part& part, int w, int lane, const Body& body) {
  if (w >= part.first_word + part.words) return;
  if (part.changes(0, w) >> lane & 1) body(0);
  for (int y = part.first_row; y < part.end_row; ++y) {
    if (part.changes(y, w) >> lane & 1) body(y);
  }
}

// places: the begin of each run but the first, per mask in column order; then H W.
__global__ void __launch_bounds__(mask_threads)
    find_changes_kernel(RowMasks masks, const long long* __restrict__ ends, long long total,
                        long long* __restrict__ places) {  // [total]
  FASTSEG_SHARED(unsigned, of_warps, [warps]);
  const int warp = static_cast<int>(threadIdx.x) / warpSize, lane = static_cast<int>(threadIdx.x) % warpSize;
  for (long long n = blockIdx.x; n < masks.count; n += gridDim.x) {
    const Part part(masks, n);
    const long long end = min(ends[n], total);
    long long before = n > 0 ? max(ends[n - 1], 0ll) : 0;  // where the columns of this round begin
    for (int first = 0; first < part.words; first += warps) {
      const int w = part.first_word + first + warp;
      unsigned own = 0;
      for_each_change(part, w, lane, [&](int) { ++own; });
      unsigned up_to = own;  // changes of this warp's columns up to this lane's
#pragma unroll
      for (int lanes = 1; lanes < warpSize; lanes *= 2) {
        const unsigned left = __shfl_up_sync(all_lanes, up_to, lanes);
        if (lane >= lanes) up_to += left;
      }
      if (lane == warpSize - 1) of_warps[warp] = up_to;
      __syncthreads();
      long long place = before + up_to - own;
      for (int other = 0; other < warps; ++other) {
        if (other < warp) place += of_warps[other];
        before += of_warps[other];
      }
      const long long x = static_cast<long long>(w) * mask_word + lane;
      for_each_change(part, w, lane, [&](int y) {
        if (place < end) places[place] = x * part.height + y;
        ++place;
      });
      __syncthreads();  // of_warps has been read
    }
    if (threadIdx.x == 0 && before < end) places[before] = static_cast<long long>(part.height) * part.width;
  }
}

__global__ void __launch_bounds__(mask_threads)
    subtract_kernel(const long long* __restrict__ places, const long long* __restrict__ ends, long long masks,
                    long long total, long long* __restrict__ counts) {
  for (long long n = blockIdx.x; n < masks; n += gridDim.x) {
    const long long begin = n > 0 ? max(ends[n - 1], 0ll) : 0, end = min(ends[n], total);
    for (long long i = begin + threadIdx.x; i < end; i += blockDim.x) {
      counts[i] = places[i] - (i > begin ? places[i - 1] : 0);
    }
  }
}

}  // namespace

cudaError_t launch_count_runs(const RowMasks& masks, long long* runs, cudaStream_t stream) {
  FASTSEG_LAUNCH(count_runs_kernel, dim3(blocks_for(masks.count)), dim3(mask_threads), 0, stream, masks, runs);
  return cudaGetLastError();
}

cudaError_t launch_run_lengths(const RowMasks& masks, const long long* ends, long long total, long long* places,
                               long long* counts, cudaStream_t stream) {
  const dim3 blocks(blocks_for(masks.count)), threads(mask_threads);
  FASTSEG_LAUNCH(find_changes_kernel, blocks, threads, 0, stream, masks, ends, total, places);
  FASTSEG_LAUNCH(subtract_kernel, blocks, threads, 0, stream, places, ends, masks.count, total, counts);
  return cudaGetLastError();
}

}  // namespace fastseg::cuda
