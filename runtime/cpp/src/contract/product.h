// The bytes of a tensor, where a stranger says its shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace tgate {

/// The product of sizes, none below 0, and `bytes`; -1 where it is above every int64.
inline std::int64_t product(const std::vector<std::int64_t>& sizes, std::int64_t bytes) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return 0;  // however large the others are
  for (const std::int64_t size : sizes) {
    if (bytes > std::numeric_limits<std::int64_t>::max() / size) return -1;
    bytes *= size;
  }
  return bytes;
}

}  // namespace tgate
