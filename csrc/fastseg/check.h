// FASTSEG_CHECK(condition, parts...): throws std::runtime_error whose message is the parts and nothing else.
//
// Torch's STD_TORCH_CHECK puts function, file and line of the build in front of what the user reads.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastseg {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fastseg

#define FASTSEG_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::fastseg::fail(__VA_ARGS__); \
  } while (false)
