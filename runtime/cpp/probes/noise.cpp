// Draws noise: `probe-noise GENERATOR SEED DRAW COUNT` writes so many float32 to stdout, `probe-noise tables` the
// ziggurat's k, w and f, four bytes a number; `probe-noise time GENERATOR COUNT` says how many nanoseconds a number
// takes, the least of seven draws of COUNT. What is refused is said on stderr, and ends in 1.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "contract/error.h"
#include "noise/noise.h"
#include "noise/ziggurat.h"

namespace {

std::uint64_t number(const char* text) { return std::strtoull(text, nullptr, 10); }

template <class T>
void write(const T* values, std::size_t count) {
  std::fwrite(values, sizeof(T), count, stdout);
}

void draw(const char* name, std::uint64_t seed, std::uint64_t draw, std::size_t count) {
  std::vector<float> values(count);
  tgate::draw_noise(tgate::generator_of(name), seed, draw, values.data(), count);
  write(values.data(), count);
}

void time(const char* name, std::size_t count) {
  std::vector<float> values(count);
  double least = 1e300;
  for (std::uint64_t seed = 0; seed < 7; ++seed) {
    const auto start = std::chrono::steady_clock::now();
    tgate::draw_noise(tgate::generator_of(name), seed, 0, values.data(), count);
    const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
    least = std::min(least, elapsed.count() / static_cast<double>(count));
  }
  std::printf("%.3f\n", least);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 5) {
      draw(argv[1], number(argv[2]), number(argv[3]), number(argv[4]));
    } else if (argc == 4) {
      time(argv[2], number(argv[3]));
    } else {
      const tgate::Ziggurat tables = tgate::ziggurat();
      write(tables.k, 256);
      write(tables.w, 256);
      write(tables.f, 256);
    }
  } catch (const tgate::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
