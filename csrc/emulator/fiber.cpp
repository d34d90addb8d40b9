#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(FASTSEG_EMULATOR_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(FASTSEG_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastseg::emulator {
namespace {

constexpr std::size_t stack_bytes = 128 * 1024;  // generous: instrumented frames are several times as large
constexpr std::size_t guard_bytes = 64 * 1024;   // a multiple of every page size in use

// The scheduler's side of a switch.
struct Scheduler {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* sanitizer_state = nullptr;
  const void* stack_bottom = nullptr;  // reported by ASan when a fiber is entered
  std::size_t stack_size = 0;
} scheduler;

#if defined(__x86_64__)

// Saves the callee-saved registers on the current stack, its stack pointer in *from, and continues on stack
// `to`. swapcontext would do the same with a system call per switch, fifty times slower.
__attribute__((naked, noinline)) void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

#endif

}  // namespace

void Fiber::create(void (*entry)()) {
  const int protection = PROT_READ | PROT_WRITE;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, guard_bytes + stack_bytes, protection, flags, -1, 0);
  if (memory == MAP_FAILED) {
    std::fputs("cuda emulator: no memory for a fiber stack\n", stderr);
    std::abort();
  }
  mprotect(memory, guard_bytes, PROT_NONE);  // a stack overflow faults instead of corrupting a neighbour
  stack_ = static_cast<char*>(memory) + guard_bytes;

#if defined(__x86_64__)
  // The first switch_stack pops six zero registers and returns into `entry`, which then finds the alignment
  // of a freshly called function (rsp % 16 == 8) and a null return address, where stack traces end.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int saved = 3; saved <= 8; ++saved) top[-saved] = nullptr;
  stack_pointer_ = top - 8;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif

#if defined(FASTSEG_EMULATOR_TSAN)
  sanitizer_state_ = __tsan_create_fiber(0);
#endif
}

void Fiber::enter_scheduler() {
#if defined(FASTSEG_EMULATOR_TSAN)
  scheduler.sanitizer_state = __tsan_get_current_fiber();
#endif
}

void Fiber::entered() {
#if defined(FASTSEG_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

void Fiber::resume() {
#if defined(FASTSEG_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.sanitizer_state, stack_, stack_bytes);
#elif defined(FASTSEG_EMULATOR_TSAN)
  __tsan_switch_to_fiber(sanitizer_state_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  switch_stack(&scheduler.stack_pointer, stack_pointer_);
#else
  swapcontext(&scheduler.context, &context_);
#endif
#if defined(FASTSEG_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.sanitizer_state, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(FASTSEG_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&sanitizer_state_, scheduler.stack_bottom, scheduler.stack_size);
#elif defined(FASTSEG_EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler.sanitizer_state, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  switch_stack(&stack_pointer_, scheduler.stack_pointer);
#else
  swapcontext(&context_, &scheduler.context);
#endif
#if defined(FASTSEG_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(sanitizer_state_, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

void synchronize_release([[maybe_unused]] void* tag) {
#if defined(FASTSEG_EMULATOR_TSAN)
  __tsan_release(tag);
#endif
}

void synchronize_acquire([[maybe_unused]] void* tag) {
#if defined(FASTSEG_EMULATOR_TSAN)
  __tsan_acquire(tag);
#endif
}

}  // namespace fastseg::emulator
