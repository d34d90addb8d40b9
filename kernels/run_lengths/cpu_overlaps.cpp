// The area of masks given as run lengths, and the pixels that two of them share, without decoding them.
#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "fastseg/dense.h"
#include "fastseg/parallel.h"

namespace fastseg {
namespace {

constexpr int64_t kFewestItems = 64;  // masks or pairs of a thread

// Walks the runs of ones of a mask. Sums are unsigned, because with arbitrary counts they may wrap around.
class Ones {
 public:
  Ones(const int64_t* counts, const int64_t* end) : at_(counts), end_(end) {}

  // Moves to the next run, at first to the first one; false if there is none.
  bool next() {
    if (end_ - at_ < 2) return false;
    begin = end + static_cast<uint64_t>(at_[0]);
    end = begin + static_cast<uint64_t>(at_[1]);
    at_ += 2;
    return true;
  }

  uint64_t begin = 0, end = 0;  // pixels of the run

 private:
  const int64_t *at_, *end_;
};

// The counts of all masks: mask n has counts [begins[n], ends[n]).
class Lists {
 public:
  Lists(const Tensor& counts, const Tensor& begins, const Tensor& ends, const char* op)
      : size_(begins.numel()), begins_(dense_values<int64_t>(begins, size_, "begins")),
        ends_(dense_values<int64_t>(ends, size_, "ends")),
        counts_(dense_values<int64_t>(counts, counts.numel(), "counts")) {
    for (int64_t n = 0; n < size_; ++n) {
      FASTSEG_CHECK(0 <= begins_[n] && begins_[n] <= ends_[n] && ends_[n] <= counts.numel(), "fastseg::", op,
                    ": the counts of a mask do not lie in counts");
    }
  }

  int64_t size() const { return size_; }
  const int64_t* begin(int64_t n) const { return counts_ + begins_[n]; }
  const int64_t* end(int64_t n) const { return counts_ + ends_[n]; }

 private:
  int64_t size_;
  const int64_t *begins_, *ends_, *counts_;
};

// pixels, area: [N]
void run_statistics(const Tensor& counts, const Tensor& begins, const Tensor& ends, const Tensor& pixels,
                    const Tensor& area) {
  constexpr const char* op = "_run_statistics";
  const Lists masks(counts, begins, ends, op);
  int64_t* all = dense_output<int64_t>(pixels, masks.size(), "pixels");
  int64_t* ones = dense_output<int64_t>(area, masks.size(), "area");
  const UnevenSlices slices(masks.size(), kFewestItems);
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      uint64_t sums[2] = {0, 0};
      const int64_t* from = masks.begin(n);
      const int64_t number = masks.end(n) - from;
      for (int64_t i = 0; i < number; ++i) sums[i % 2] += static_cast<uint64_t>(from[i]);
      all[n] = static_cast<int64_t>(sums[0] + sums[1]);
      ones[n] = static_cast<int64_t>(sums[1]);
    }
  });
}

int64_t overlap(Ones a, Ones b) {
  uint64_t shared = 0;
  if (!a.next() || !b.next()) return 0;
  while (true) {
    const uint64_t begin = std::max(a.begin, b.begin), end = std::min(a.end, b.end);
    shared += end > begin ? end - begin : 0;
    if (!(a.end <= b.end ? a.next() : b.next())) return static_cast<int64_t>(shared);
  }
}

// first, second, shared: [pairs]
void run_overlaps(const Tensor& counts, const Tensor& begins, const Tensor& ends, const Tensor& first,
                  const Tensor& second, const Tensor& shared) {
  constexpr const char* op = "_run_overlaps";
  const Lists masks(counts, begins, ends, op);
  const int64_t pairs = first.numel();
  const int64_t* one = dense_values<int64_t>(first, pairs, "first");
  const int64_t* other = dense_values<int64_t>(second, pairs, "second");
  int64_t* to = dense_output<int64_t>(shared, pairs, "shared");
  for (int64_t p = 0; p < pairs; ++p) {
    FASTSEG_CHECK(0 <= one[p] && one[p] < masks.size() && 0 <= other[p] && other[p] < masks.size(), "fastseg::", op,
                  ": a pair has a mask that is not there");
  }
  const UnevenSlices slices(pairs, kFewestItems);
  slices.run([&](int64_t /*slice*/, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      to[p] = overlap({masks.begin(one[p]), masks.end(one[p])}, {masks.begin(other[p]), masks.end(other[p])});
    }
  });
}

}  // namespace
}  // namespace fastseg

STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("_run_statistics", TORCH_BOX(&fastseg::run_statistics));
  m.impl("_run_overlaps", TORCH_BOX(&fastseg::run_overlaps));
}
