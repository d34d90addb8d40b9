// Large outputs on huge pages.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/tensor.h>

namespace fastseg {

// Asks the system to back `output`, which the caller is about to fill, with huge pages. malloc gives every large tensor
// a fresh mapping, and touching one in 4 KB pages costs more than computing what goes into it: 80 MB took 33 ms, on
// huge pages 5 ms. A hint: where the system has none to give (or transparent_hugepage is "never") nothing changes. On
// memory that malloc reuses it costs one system call. FASTSEG_HUGE_PAGES=0 turns it off.
inline void use_huge_pages(const torch::stable::Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  constexpr uintptr_t kWorthwhile = 4 * kHugePage;
  static const bool wanted = [] {
    const char* value = std::getenv("FASTSEG_HUGE_PAGES");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  const uintptr_t bytes = static_cast<uintptr_t>(output.numel()) * output.element_size();
  if (!wanted || bytes < kWorthwhile) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastseg
