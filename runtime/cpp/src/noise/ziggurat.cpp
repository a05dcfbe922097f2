// The generator `numpy` of docs/bundle.md: words of Philox4x64-10, numbers by a ziggurat of 256 layers.

#include "noise/ziggurat.h"

#include <cmath>
#include <cstring>

#include "noise/philox.h"

namespace tgate {
namespace {

#include "noise/ziggurat.inc"

constexpr float tail_start = 3.6541528853610088F, tail_scale = 0.27366123732975828F;

float with_sign(float value, std::uint32_t sign_bit) {
  std::uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  std::memcpy(&bits, &value, sizeof bits);
  bits ^= sign_bit << 31;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

/// The 32-bit words of a stream, one after the other, made many at a time.
class Words {
 public:
  Words(std::uint64_t seed, std::uint64_t draw) : seed_(seed), draw_(draw) {}

  std::uint32_t next() {
    if (at_ == held) refill();
    return words_[at_++];
  }
  /// A number of at least 0, below 1.
  float uniform() { return static_cast<float>(next() >> 8) * 0x1p-24F; }

 private:
  static constexpr std::size_t held = 256;  // whole blocks of eight

  void refill() {
    for (std::uint32_t* word = words_; word != words_ + held;) {
      for (const std::uint64_t half : philox<std::uint64_t>({++counter_, 0, 0, draw_}, seed_, 0)) {
        *word++ = static_cast<std::uint32_t>(half);
        *word++ = static_cast<std::uint32_t>(half >> 32);
      }
    }
    at_ = 0;
  }

  std::uint64_t seed_, draw_;
  std::uint64_t counter_ = 0;  // its lowest word; nobody draws so many numbers that the next one would go up
  std::size_t at_ = held;
  std::uint32_t words_[held];
};

/// What is beyond the last layer.
float tail(Words& words, std::uint32_t sign_bit) {
  for (;;) {
    const float a = -tail_scale * std::log1p(-words.uniform());
    const float b = -std::log1p(-words.uniform());
    if (b + b > a * a) return with_sign(tail_start + a, sign_bit);
  }
}

/// The number that begins with `first`, which is not inside of its layer; it takes as many words as it needs.
float slow(Words& words, std::uint32_t first) {
  for (std::uint32_t r = first;; r = words.next()) {
    const std::uint32_t i = r & 255, m = r >> 9;
    const float x = static_cast<float>(m) * layer_w[i];
    if (m < layer_k[i]) return with_sign(x, r >> 8 & 1);
    if (i == 0) return tail(words, m >> 8 & 1);
    const float height = (layer_f[i - 1] - layer_f[i]) * words.uniform() + layer_f[i];
    const double wide = x;
    if (height < std::exp(-0.5 * wide * wide)) return with_sign(x, r >> 8 & 1);
  }
}

}  // namespace

void draw_ziggurat(std::uint64_t seed, std::uint64_t draw, float* out, std::size_t count) {
  Words words(seed, draw);
  for (std::size_t n = 0; n < count; ++n) {
    const std::uint32_t r = words.next(), i = r & 255, m = r >> 9;
    // Nearly all numbers lie inside of their layers.
    out[n] = m < layer_k[i] ? with_sign(static_cast<float>(m) * layer_w[i], r >> 8 & 1) : slow(words, r);
  }
}

Ziggurat ziggurat() { return {layer_k, layer_w, layer_f}; }

}  // namespace tgate
