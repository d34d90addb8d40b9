// Greedy box NMS on CUDA: boxes are sorted by score; tiles of 64 x 64 pairs become bits (one box suppresses the other);
// one block walks through the bits. See README.md.
#include "nms/cuda.h"

#include "cuda/cell_walk.h"
#include "nms/cuda_overlap.h"
#include "nms/math.h"

namespace fastseg::cuda {
namespace {

using Bits = unsigned long long;

constexpr int prepare_threads = 256;
constexpr int sweep_threads = 512;

// Gathers boxes and classes in the order of scores; initialises the outputs and `removed`.
template <typename real_t>
__global__ void __launch_bounds__(prepare_threads)
    prepare_kernel(const real_t* __restrict__ boxes,     // [count, 4]
                   const int64_t* __restrict__ order,    // [count]
                   const int64_t* __restrict__ classes,  // [count] or null
                   int64_t count,
                   real_t* __restrict__ sorted,           // [count, 4]
                   int64_t* __restrict__ sorted_classes,  // [count]
                   Bits* __restrict__ removed,            // [words]
                   int64_t most, int64_t* __restrict__ indices, int64_t* __restrict__ found) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * prepare_threads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * prepare_threads;
  for (int64_t rank = thread; rank < count; rank += threads) {
    const int64_t box = order[rank];
#pragma unroll
    for (int i = 0; i < 4; ++i) sorted[4 * rank + i] = boxes[4 * box + i];
    if (classes != nullptr) sorted_classes[rank] = classes[box];
  }
  for (int64_t word = thread; word < nms_words(count); word += threads) removed[word] = 0;
  for (int64_t place = thread; place < most; place += threads) indices[place] = -1;
  if (thread == 0) *found = 0;
}

// Bit j of bits[i - first][word]: box 64 word + j comes after box i, is of its class and overlaps it too much. A block
// takes the tile of 64 boxes i from first + 64 blockIdx.y on, and the 64 boxes of the word blockIdx.x words after that
// of `first`. Words of boxes that are already removed are not written.
template <typename real_t>
__global__ void __launch_bounds__(nms_tile)
    compare_kernel(const real_t* __restrict__ sorted,           // [count, 4]
                   const int64_t* __restrict__ sorted_classes,  // [count] or null
                   int64_t count, real_t threshold, int64_t first, int64_t words,
                   const Bits* __restrict__ removed,  // [words]
                   int64_t most, const int64_t* __restrict__ found,
                   Bits* __restrict__ bits) {  // [min(count, nms_strip), words]
  FASTSEG_SHARED(Corners<real_t>, others, [nms_tile]);
  FASTSEG_SHARED(real_t, areas, [nms_tile]);
  FASTSEG_SHARED(int64_t, kinds, [nms_tile]);
  const int64_t row_word = first / nms_tile + blockIdx.y, word = first / nms_tile + blockIdx.x;
  if (word < row_word || row_word >= words || *found >= most || removed[row_word] == ~Bits{0}) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = nms_tile * word, rank = nms_tile * row_word + thread;
  const int others_count = static_cast<int>(min(static_cast<int64_t>(nms_tile), count - begin));
  if (thread < others_count) {
    others[thread] = load_pack<4>(sorted + 4 * (begin + thread));
    areas[thread] = area_of(others[thread]);
    if (sorted_classes != nullptr) kinds[thread] = sorted_classes[begin + thread];
  }
  __syncthreads();
  if (rank >= count || (removed[row_word] >> thread & 1) != 0) return;
  const auto box = load_pack<4>(sorted + 4 * rank);
  const real_t area = area_of(box);
  const int64_t kind = sorted_classes != nullptr ? sorted_classes[rank] : 0;
  Bits found_bits = 0;
  for (int j = word == row_word ? thread + 1 : 0; j < others_count; ++j) {
    const bool same_class = sorted_classes == nullptr || kinds[j] == kind;
    if (same_class && overlap(box, area, others[j], areas[j]) > threshold) found_bits |= Bits{1} << j;
  }
  bits[(rank - first) * words + word] = found_bits;
}

// Keeps or drops the boxes [first, first + nms_strip) in their order, 64 at a time, and removes later boxes that the
// kept ones suppress. One block.
__global__ void __launch_bounds__(sweep_threads, 1)
    sweep_kernel(const Bits* __restrict__ bits,      // [min(count, nms_strip), words]
                 const int64_t* __restrict__ order,  // [count]
                 int64_t count, int64_t first, int64_t words, Bits* removed, int64_t most,
                 int64_t* __restrict__ indices, int64_t* found) {
  FASTSEG_SHARED(Bits, diagonal, [nms_tile]);  // the current tile against itself
  FASTSEG_SHARED(int, kept, [nms_tile]);       // which of its boxes are kept
  FASTSEG_SHARED(int, kept_count, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t end = min(first + nms_strip, count);
  const int64_t place_before = *found;
  int64_t place = place_before;
  for (int64_t begin = first; begin < end && place < most; begin += nms_tile) {
    const int64_t word = begin / nms_tile;
    const int size = static_cast<int>(min(static_cast<int64_t>(nms_tile), end - begin));
    const Bits* rows = bits + (begin - first) * words;
    if (thread < size) diagonal[thread] = rows[thread * words + word];
    __syncthreads();
    if (thread == 0) {
      Bits left = ~removed[word];
      if (size < nms_tile) left &= (Bits{1} << size) - 1;
      int number = 0;
      while (left != 0 && number < most - place) {
        const int next = __ffsll(static_cast<long long>(left)) - 1;
        kept[number++] = next;
        left &= ~(diagonal[next] | Bits{1} << next);
      }
      kept_count[0] = number;
    }
    __syncthreads();
    const int number = kept_count[0];
    if (thread < number) indices[place + thread] = order[begin + kept[thread]];
    for (int64_t later = word + 1 + thread; later < words; later += sweep_threads) {
      Bits gone = removed[later];
#pragma unroll 4
      for (int i = 0; i < number; ++i) gone |= rows[kept[i] * words + later];
      removed[later] = gone;
    }
    place += number;
    __syncthreads();  // `removed` has been written, `kept` has been read
  }
  // If nothing was found there may have been no barrier, and other threads may not have read *found yet.
  if (thread == 0 && place != place_before) *found = place;
}

}  // namespace

template <typename real_t>
cudaError_t launch_nms(const real_t* boxes, const int64_t* order, const int64_t* classes, int64_t count,
                       double iou_threshold, real_t* sorted, int64_t* sorted_classes, unsigned long long* bits,
                       unsigned long long* removed, int64_t most, int64_t* indices, int64_t* found,
                       cudaStream_t stream) {
  int processors = 0;
  if (cudaError_t error = count_processors(processors)) return error;
  const int64_t items = count > most ? count : most;
  const int64_t needed = items / prepare_threads + 1, resident = int64_t{8} * processors;
  const unsigned blocks = static_cast<unsigned>(needed < resident ? needed : resident);
  FASTSEG_LAUNCH(prepare_kernel<real_t>, dim3(blocks), dim3(prepare_threads), 0, stream, boxes, order, classes, count,
                 sorted, sorted_classes, removed, most, indices, found);
  const real_t threshold = nms::rounded_down<real_t>(iou_threshold);
  const int64_t words = nms_words(count);
  for (int64_t first = 0; first < count; first += nms_strip) {
    const int64_t left = words - first / nms_tile;
    const dim3 tiles(static_cast<unsigned>(left),
                     static_cast<unsigned>(left < nms_strip / nms_tile ? left : nms_strip / nms_tile));
    FASTSEG_LAUNCH(compare_kernel<real_t>, tiles, dim3(nms_tile), 0, stream, sorted, sorted_classes, count, threshold,
                   first, words, removed, most, found, bits);
    FASTSEG_LAUNCH(sweep_kernel, dim3(1), dim3(sweep_threads), 0, stream, bits, order, count, first, words, removed,
                   most, indices, found);
  }
  return cudaGetLastError();
}

#define INSTANTIATE(real_t)                                                                                          \
  template cudaError_t launch_nms(const real_t*, const int64_t*, const int64_t*, int64_t, double, real_t*, int64_t*, \
                                  unsigned long long*, unsigned long long*, int64_t, int64_t*, int64_t*,             \
                                  cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastseg::cuda
