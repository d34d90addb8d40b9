// Runs the blocks of a grid one after another and the threads of a block as fibers, switching at barriers.
// Compile without -fsanitize (see fiber.h). No standard containers here: their inline functions would be
// merged by the linker with the instrumented copies of the kernel's file.
#include "emulator/cuda_emulator.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/fiber.h"

#if defined(FASTSEG_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastseg::emulator {
namespace {

constexpr int max_warps = max_threads / warpSize;

enum class State : unsigned char { ready, at_block_barrier, at_warp_collective, finished };

const char* const operation_names[] = {"__syncwarp",       "__shfl_sync",   "__shfl_xor_sync",  "__shfl_up_sync",
                                       "__shfl_down_sync", "__ballot_sync", "__match_any_sync", "__reduce_add_sync"};

// For ThreadSanitizer a tag orders everything before a barrier before everything after it. Each barrier takes a tag
// of its own from a ring: a slow thread that still leaves this barrier must not acquire what a fast thread releases at
// the next one.
using SyncTag = std::uint64_t;

struct Thread {
  Fiber fiber;
  uint3 index;
  int linear = 0;  // x + blockDim.x * (y + blockDim.y * z)
  State state = State::finished;
  // while waiting at a collective, and its outcome
  WarpOperation operation = WarpOperation::syncwarp;
  unsigned mask = 0;
  int source_lane = 0;
  std::uint64_t value = 0, result = 0;
};

// A collective that some lanes of its mask have reached. A warp may have several, with disjoint masks.
struct Collective {
  WarpOperation operation;
  unsigned mask, arrived;
  SyncTag* tag;
};

struct Warp {
  unsigned alive = 0;
  Collective pending[warpSize];
  int pending_count = 0;
};

struct Block {
  std::uint64_t number = 0;  // counts all blocks ever run: tells whether a SharedSlot belongs to this one
  int threads = 0, alive = 0;
  // the barrier that threads are now gathering at
  int arrived = 0, line = 0, predicates = 0, last_predicates = 0;
  SyncTag* barrier_tag = nullptr;
  std::size_t shared_bytes = 0, shared_limit = 0;
  std::size_t arena_used = 0;  // shared_bytes and the gaps between the variables
};

Thread threads[max_threads];
Warp warps[max_warps];
Block block;
Thread* current = nullptr;
void (*body)(void*) = nullptr;
void* body_context = nullptr;
SyncTag block_start_tag, block_end_tag;  // two, or a thread that ends would be ordered before one that starts
SyncTag tag_ring[1024];
unsigned next_tag_index = 0;

constexpr std::size_t arena_bytes = max_shared_bytes + 64 * 1024;  // with room for gaps between variables
alignas(128) unsigned char shared_memory[arena_bytes];
std::size_t dynamic_shared_offset = 0;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "cuda emulator: %s (block %u,%u,%u thread %d)\n", message, blockIdx.x, blockIdx.y, blockIdx.z,
               current ? current->linear : -1);
  int shown = 0;
  for (int i = 0; i < block.threads && shown < 8; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::at_block_barrier) {
      std::fprintf(stderr, "  thread %d waits at __syncthreads\n", thread.linear);
    } else if (thread.state == State::at_warp_collective) {
      std::fprintf(stderr, "  thread %d waits at %s, mask %08x\n", thread.linear,
                   operation_names[static_cast<int>(thread.operation)], thread.mask);
    } else {
      continue;
    }
    ++shown;
  }
  std::abort();
}

SyncTag* next_tag() { return &tag_ring[next_tag_index++ % (sizeof tag_ring / sizeof *tag_ring)]; }

// ---- shared memory: one arena, poisoned for ASan except for the variables of the running block ----

void forbid_access([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(FASTSEG_EMULATOR_ASAN)
  __asan_poison_memory_region(memory, bytes);
#endif
}

void allow_access([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(FASTSEG_EMULATOR_ASAN)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

unsigned char* allocate_shared(std::size_t bytes, std::size_t alignment) {
  constexpr std::size_t gap = 128;  // stays poisoned: an overrun does not reach the next variable unseen
  alignment = alignment < 16 ? 16 : alignment;
  const std::size_t begin = (block.arena_used + gap + alignment - 1) / alignment * alignment;
  block.shared_bytes += bytes;
  if (block.shared_bytes > block.shared_limit || begin + bytes + gap > sizeof shared_memory) {
    fail("more static and dynamic shared memory than the launch may have");
  }
  block.arena_used = begin + bytes;
  allow_access(shared_memory + begin, bytes);
  // volatile: a memset would be intercepted by ThreadSanitizer and count as a write of the calling thread
  auto* words = reinterpret_cast<volatile std::uint64_t*>(shared_memory + begin);
  const std::size_t count = (bytes + 7) / 8;  // what this rounds up falls into the gap
  for (std::size_t i = 0; i < count; ++i) words[i] = ~std::uint64_t{0};
  return shared_memory + begin;
}

// ---- threads ----

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  thread.fiber.resume();
  current = nullptr;
}

void wait_as(State state) {
  current->state = state;
  current->fiber.suspend();
}

// Opens the barrier once every thread that still runs has arrived; a thread that returned counts as arrived.
void open_barrier_if_complete() {
  if (block.alive == 0 || block.arrived < block.alive) return;
  block.arrived = 0;
  block.last_predicates = block.predicates;
  block.predicates = 0;
  block.barrier_tag = next_tag();
  for (int i = 0; i < block.threads; ++i) {
    if (threads[i].state == State::at_block_barrier) threads[i].state = State::ready;
  }
}

// CUDA lets a mask name lanes that have returned, but what is read from them is undefined: refused here.
constexpr char returned_lane[] = "the mask of a warp operation names a lane that has returned or never existed";

void leave_warp() {
  Warp& warp = warps[current->linear / warpSize];
  const unsigned own_bit = 1u << current_lane();
  warp.alive &= ~own_bit;
  for (int i = 0; i < warp.pending_count; ++i) {
    if (warp.pending[i].mask & own_bit) fail(returned_lane);
  }
}

void thread_main() {
  Fiber::entered();
  for (;;) {  // one round per block that this fiber serves
    synchronize_acquire(&block_start_tag);
    body(body_context);
    synchronize_release(&block_end_tag);
    leave_warp();
    --block.alive;
    current->state = State::finished;
    open_barrier_if_complete();
    current->fiber.suspend();
  }
}

// ---- warp collectives ----

std::uint64_t result_for(const Thread& thread, const Thread* lanes, unsigned mask) {
  std::uint64_t result = 0;
  switch (thread.operation) {
    case WarpOperation::syncwarp: return 0;
    case WarpOperation::shuffle:
    case WarpOperation::shuffle_xor:
    case WarpOperation::shuffle_up:
    case WarpOperation::shuffle_down: {
      const int source = thread.source_lane & (warpSize - 1);
      return mask >> source & 1 ? lanes[source].value : ~std::uint64_t{0};  // undefined in CUDA: NaN
    }
    case WarpOperation::ballot:
    case WarpOperation::match_any:
    case WarpOperation::reduce_add:
      for (int lane = 0; lane < warpSize; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const std::uint64_t bit = std::uint64_t{1} << lane;
        if (thread.operation == WarpOperation::reduce_add) result += lanes[lane].value;
        else if (thread.operation == WarpOperation::ballot) result |= lanes[lane].value ? bit : 0;
        else result |= lanes[lane].value == thread.value ? bit : 0;
      }
      return result;
  }
  return 0;
}

Collective& join_collective(Warp& warp, WarpOperation operation, unsigned mask) {
  for (int i = 0; i < warp.pending_count; ++i) {
    Collective& pending = warp.pending[i];
    if (pending.mask != mask) continue;  // other lanes; masks that overlap end in the deadlock report
    if (pending.operation != operation) fail("lanes of one mask execute different warp operations");
    return pending;
  }
  warp.pending[warp.pending_count] = {operation, mask, 0, next_tag()};
  return warp.pending[warp.pending_count++];
}

}  // namespace

int current_lane() { return current->linear % warpSize; }

std::uint64_t warp_collective(WarpOperation operation, unsigned mask, std::uint64_t value, int source_lane) {
  Thread& self = *current;
  Warp& warp = warps[self.linear / warpSize];
  const unsigned own_bit = 1u << current_lane();
  if (!(mask & own_bit)) fail("a lane calls a warp operation with a mask that leaves it out");
  if (mask & ~warp.alive) fail(returned_lane);
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source_lane = source_lane;

  Collective& collective = join_collective(warp, operation, mask);
  SyncTag* tag = collective.tag;
  const bool orders_memory = operation == WarpOperation::syncwarp;  // shuffles and votes promise no ordering
  if (orders_memory) synchronize_release(tag);
  collective.arrived |= own_bit;
  if (collective.arrived == mask) {
    Thread* lanes = &threads[self.linear / warpSize * warpSize];
    for (int lane = 0; lane < warpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      lanes[lane].result = result_for(lanes[lane], lanes, mask);
      lanes[lane].state = State::ready;
    }
    collective = warp.pending[--warp.pending_count];
  } else {
    wait_as(State::at_warp_collective);
  }
  if (orders_memory) synchronize_acquire(tag);
  return self.result;
}

int block_barrier(int predicate, int line) {
  if (block.arrived > 0 && block.line != line) fail("threads of one block wait at different __syncthreads");
  block.line = line;
  SyncTag* tag = block.barrier_tag;
  synchronize_release(tag);
  ++block.arrived;
  block.predicates += predicate != 0;
  current->state = State::at_block_barrier;
  open_barrier_if_complete();
  current->fiber.suspend();
  synchronize_acquire(tag);
  return block.last_predicates;
}

void* shared_variable(SharedSlot& slot, std::size_t bytes, std::size_t alignment) {
  if (slot.block != block.number) slot = {block.number, allocate_shared(bytes, alignment)};
  return slot.memory;
}

void* dynamic_shared() { return shared_memory + dynamic_shared_offset; }

// ---- grids ----

namespace {

// The order in which the scheduler visits the threads of a block.
class VisitingOrder {
 public:
  explicit VisitingOrder(int count) : count_(count) {
    const char* setting = std::getenv("FASTSEG_EMULATOR_ORDER");
    const bool reverse = setting && std::strcmp(setting, "reverse") == 0;
    shuffled_ = setting && !reverse && std::strcmp(setting, "forward") != 0;
    if (shuffled_) state_ = 0x9E3779B97F4A7C15ull * (std::strtoull(setting, nullptr, 10) + 1) | 1;
    for (int i = 0; i < count; ++i) order_[i] = static_cast<short>(reverse ? count - 1 - i : i);
  }
  void next_round() {
    for (int i = count_ - 1; shuffled_ && i > 0; --i) {
      const int other = static_cast<int>(random() % static_cast<unsigned>(i + 1));
      const short moved = order_[i];
      order_[i] = order_[other];
      order_[other] = moved;
    }
  }
  int operator[](int i) const { return order_[i]; }

 private:
  std::uint64_t random() {  // xorshift
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  int count_;
  bool shuffled_;
  std::uint64_t state_ = 1;
  short order_[max_threads];
};

void start_block(std::size_t dynamic_shared_bytes) {
  ++block.number;
  block.alive = block.threads;
  block.arrived = block.predicates = 0;
  block.barrier_tag = next_tag();
  forbid_access(shared_memory, sizeof shared_memory);
  block.shared_bytes = block.arena_used = 0;
  dynamic_shared_offset = allocate_shared(dynamic_shared_bytes, 16) - shared_memory;
  for (int i = 0; i < block.threads; ++i) {
    const unsigned position = static_cast<unsigned>(i);
    threads[i].index = {position % blockDim.x, position / blockDim.x % blockDim.y,
                        position / (blockDim.x * blockDim.y)};
    threads[i].linear = i;
    threads[i].state = State::ready;
  }
  for (int first = 0; first < block.threads; first += warpSize) {
    const int lanes = block.threads - first < warpSize ? block.threads - first : warpSize;
    warps[first / warpSize].alive = lanes == warpSize ? ~0u : (1u << lanes) - 1;
    warps[first / warpSize].pending_count = 0;
  }
}

void run_block(VisitingOrder& order) {
  synchronize_release(&block_start_tag);
  while (block.alive > 0) {
    order.next_round();
    bool progress = false;
    for (int i = 0; i < block.threads; ++i) {
      Thread& thread = threads[order[i]];
      if (thread.state != State::ready) continue;
      progress = true;
      resume(thread);
    }
    if (!progress) fail("deadlock: a barrier or warp operation that not all of its threads reach");
  }
  synchronize_acquire(&block_end_tag);
}

}  // namespace

void run_grid(dim3 grid, dim3 block_size, std::size_t dynamic_shared_bytes, const void* kernel,
              void (*thread_body)(void*), void* context) {
  if (current) fail("launch from inside a kernel, or from two host threads at once");
  if (!accept_launch(grid, block_size, dynamic_shared_bytes, kernel, block.shared_limit)) return;
  body = thread_body;
  body_context = context;
  blockDim = block_size;
  gridDim = grid;
  block.threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  for (int i = 0; i < block.threads; ++i) {
    if (!threads[i].fiber.created()) threads[i].fiber.create(thread_main);
  }
  Fiber::enter_scheduler();
  VisitingOrder order(block.threads);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        start_block(dynamic_shared_bytes);
        run_block(order);
      }
    }
  }
}

}  // namespace fastseg::emulator
