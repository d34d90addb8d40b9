// A stack that can be left and entered again: the execution context of one emulated CUDA thread.
//
// There is one scheduler (the host thread that launched the kernel) and many fibers; control only ever passes
// scheduler -> fiber (resume) and fiber -> scheduler (suspend). Every switch is announced to the sanitizers:
//   FASTSEG_EMULATOR_ASAN  AddressSanitizer must know which stack is in use;
//   FASTSEG_EMULATOR_TSAN  ThreadSanitizer treats each fiber as a thread of its own. A switch orders nothing,
//                          only synchronize_release/acquire do, called where CUDA promises order: a missing
//                          barrier is therefore reported as a data race.
// The files of this folder are compiled WITHOUT -fsanitize: their own bookkeeping crosses fibers.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastseg::emulator {

class Fiber {
 public:
  // Allocates the stack on the first call. `entry` starts at the first resume() and must never return.
  void create(void (*entry)());
  bool created() const { return stack_ != nullptr; }

  void resume();   // called by the scheduler; returns when the fiber suspends
  void suspend();  // called on the fiber itself; returns when the scheduler resumes it

  // To be called first thing by `entry`.
  static void entered();
  // To be called by the scheduler before it resumes any fiber: remembers which thread it runs on.
  static void enter_scheduler();

 private:
  char* stack_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* sanitizer_state_ = nullptr;  // ASan: saved fake stack; TSan: the fiber's handle
};

// What the fiber did before `release(tag)` happens before what another does after its later `acquire(tag)`.
void synchronize_release(void* tag);
void synchronize_acquire(void* tag);

}  // namespace fastseg::emulator
