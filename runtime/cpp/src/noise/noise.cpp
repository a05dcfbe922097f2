#include "noise/noise.h"

#include <cmath>
#include <string>

#include "contract/error.h"
#include "noise/philox.h"
#include "noise/ziggurat.h"

namespace tgate {
namespace {

constexpr std::uint64_t seed_limit = std::uint64_t{1} << 63;
constexpr float two_pi = 6.283185307179586F;
constexpr double turn = static_cast<double>(two_pi) * 0x1p-32;

/// Box and Muller's sine, of the first two words of a block. Each cast to float rounds, and nothing else does but the
/// double's own operations.
float box_muller(std::uint32_t c0, std::uint32_t c1) {
  const float u = static_cast<float>(c0) * 0x1p-32F + 0x1p-33F;  // above 0, at most 1
  const auto v = static_cast<float>(static_cast<double>(static_cast<float>(c1)) * turn + turn / 2);
  const float radius = std::sqrt(-2.0F * static_cast<float>(std::log(static_cast<double>(u))));
  return radius * static_cast<float>(std::sin(static_cast<double>(v)));
}

/// Number n is of the block with the counter (draw, n).
void draw_box_muller(std::uint64_t seed, std::uint64_t draw, float* out, std::size_t count) {
  for (std::size_t n = 0; n < count; ++n) {
    const Block<std::uint32_t> block = philox<std::uint32_t>(
        {static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32), static_cast<std::uint32_t>(n), 0},
        static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    out[n] = box_muller(block[0], block[1]);
  }
}

}  // namespace

void draw_noise(Generator generator, std::uint64_t seed, std::uint64_t draw, float* out, std::size_t count) {
  if (seed >= seed_limit) {
    throw Error(Code::request, "a seed is a whole number from 0 to " + std::to_string(seed_limit - 1) + ", got " +
                                   std::to_string(seed));
  }
  if (generator == Generator::numpy) return draw_ziggurat(seed, draw, out, count);
  if (count > torch_cuda_limit) {
    throw Error(Code::request, "generator torch-cuda draws at most " + std::to_string(torch_cuda_limit) +
                                   " numbers at once, got " + std::to_string(count) +
                                   ": beyond that PyTorch's noise depends on the GPU; use generator numpy");
  }
  if (draw == conditioning_draw) {
    throw Error(Code::request,
                "generator torch-cuda draws noise of latents and steps, got a conditioning picture's; use generator "
                "numpy");
  }
  draw_box_muller(seed, draw, out, count);
}

Generator generator_of(std::string_view name) {
  if (name == "numpy") return Generator::numpy;
  if (name == "torch-cuda") return Generator::torch_cuda;
  throw Error(Code::request, "there is no generator '" + shown(name) + "'; use one of numpy, torch-cuda");
}

}  // namespace tgate
