// The generator `numpy` of docs/bundle.md, by itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tgate {

/// As draw_noise draws with Generator::numpy; nothing is refused.
void draw_ziggurat(std::uint64_t seed, std::uint64_t draw, float* out, std::size_t count);

/// Its tables, of 256 numbers each, which live as long as the program.
struct Ziggurat {
  const std::uint32_t* k;
  const float* w;
  const float* f;
};
Ziggurat ziggurat();

}  // namespace tgate
