// Philox4x64-10 and Philox4x32-10: the counter-based generators under both kinds of noise.
#pragma once

#include <array>
#include <cstdint>

namespace tgate {

/// Two words' product, its upper and its lower half.
template <class Word>
struct Halves {
  Word high, low;
};

inline Halves<std::uint64_t> multiply(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return {static_cast<std::uint64_t>(product >> 64), static_cast<std::uint64_t>(product)};
}

inline Halves<std::uint32_t> multiply(std::uint32_t a, std::uint32_t b) {
  const std::uint64_t product = static_cast<std::uint64_t>(a) * b;
  return {static_cast<std::uint32_t>(product >> 32), static_cast<std::uint32_t>(product)};
}

/// What rounds multiply by, and what a round adds to the key.
template <class Word>
struct PhiloxConstants;
template <>
struct PhiloxConstants<std::uint64_t> {
  static constexpr std::uint64_t p = 0xD2E7470EE14C6C93, q = 0xCA5A826395121157;
  static constexpr std::uint64_t k0 = 0x9E3779B97F4A7C15, k1 = 0xBB67AE8584CAA73B;
};
template <>
struct PhiloxConstants<std::uint32_t> {
  static constexpr std::uint32_t p = 0xD2511F53, q = 0xCD9E8D57;
  static constexpr std::uint32_t k0 = 0x9E3779B9, k1 = 0xBB67AE85;
};

template <class Word>
using Block = std::array<Word, 4>;

/// The block of a counter, `c`, under a key.
template <class Word>
inline Block<Word> philox(Block<Word> c, Word k0, Word k1) {
  using Constants = PhiloxConstants<Word>;
  for (int round = 0; round < 10; ++round) {
    const Halves<Word> p = multiply(Constants::p, c[0]), q = multiply(Constants::q, c[2]);
    c = {q.high ^ c[1] ^ k0, q.low, p.high ^ c[3] ^ k1, p.low};
    k0 += Constants::k0;
    k1 += Constants::k1;
  }
  return c;
}

}  // namespace tgate
