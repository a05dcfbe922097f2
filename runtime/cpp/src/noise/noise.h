// Noise from a seed, as docs/bundle.md defines it to the last operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tgate {

enum class Generator : std::uint8_t { numpy, torch_cuda };

/// Which of an image's noises: the first latents', step i's, a conditioning picture's.
inline constexpr std::uint64_t initial_draw = 0;
constexpr std::uint64_t draw_of_step(std::uint64_t step) { return step + 1; }
inline constexpr std::uint64_t conditioning_draw = ~std::uint64_t{0};

/// The most numbers that torch_cuda draws at once: the threads of an A100.
inline constexpr std::size_t torch_cuda_limit = 108 * 2048;

/// Standard normal numbers into `out`, `count` of them, for the image that has `seed`, below 2^63. Throws Error of
/// Code::request for what torch_cuda does not draw.
void draw_noise(Generator generator, std::uint64_t seed, std::uint64_t draw, float* out, std::size_t count);

/// "numpy" or "torch-cuda". Throws Error of Code::request, which lists them, for any other name.
Generator generator_of(std::string_view name);

}  // namespace tgate
