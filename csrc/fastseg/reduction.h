// How a loss is reduced: fastseg/_reduction.py.
#pragma once

#include <cstdint>

namespace fastseg {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kMeanOfCount = 3 };

}  // namespace fastseg
