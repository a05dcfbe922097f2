#include "contract/numbers.h"

#include <cmath>
#include <cstring>

#include "contract/error.h"

namespace tgate {
namespace {

std::uint32_t bits_of(float value) noexcept {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(std::uint32_t bits) noexcept {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T at(const void* stored, std::size_t index) noexcept {
  T value{};
  std::memcpy(&value, static_cast<const std::byte*>(stored) + index * sizeof(T), sizeof(T));
  return value;
}

const char* const advice =
    "where the bundle or the engine computes in float16, which ends at 65504, export with --dtype bf16 or fp32; else ask "
    "`tgate verify` whether this engine draws this bundle right";

}  // namespace

std::uint16_t to_half(float value) noexcept {
  const std::uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000U, rest = bits & 0x7FFFFFFFU;
  if (rest > 0x7F800000U) {  // no number stays one
    const std::uint32_t payload = (rest >> 13) & 0x3FFU;
    return static_cast<std::uint16_t>(sign | 0x7C00U | (payload == 0 ? 1U : payload));
  }
  if (rest >= 0x47800000U) {  // 65536 and more
    return static_cast<std::uint16_t>(sign | 0x7C00U);
  }
  if (rest >= 0x38800000U) {  // a normal number; what rounds up beyond the largest becomes infinite by itself
    const std::uint32_t rounded = rest - 0x38000000U + 0xFFFU + ((rest >> 13) & 1U);
    return static_cast<std::uint16_t>(sign | (rounded >> 13));
  }
  if (rest < 0x33000000U) {  // below half of the smallest
    return static_cast<std::uint16_t>(sign);
  }
  const std::uint32_t shift = 126U - (rest >> 23), mantissa = (rest & 0x7FFFFFU) | 0x800000U;
  const std::uint32_t whole = mantissa >> shift, left = mantissa & ((1U << shift) - 1U), half = 1U << (shift - 1U);
  return static_cast<std::uint16_t>(sign | (whole + (left > half || (left == half && (whole & 1U)) ? 1U : 0U)));
}

std::uint16_t to_bfloat(float value) noexcept {
  if (std::isnan(value)) {
    return 0x7FC0U;
  }
  const std::uint32_t bits = bits_of(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

float from_half(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16, exponent = (bits >> 10) & 0x1FU;
  const std::uint32_t mantissa = bits & 0x3FFU;
  if (exponent == 0) {  // exact: a few units of 2^-24
    const float size = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -size : size;
  }
  const std::uint32_t high = exponent == 31 ? 0x7F800000U : (exponent + 112U) << 23;
  return float_of(sign | high | (mantissa << 13));
}

float from_bfloat(std::uint16_t bits) noexcept { return float_of(static_cast<std::uint32_t>(bits) << 16); }

void encode(const float* values, std::size_t count, Dtype dtype, void* to) noexcept {
  if (dtype == Dtype::float32) {
    std::memcpy(to, values, count * sizeof(float));
    return;
  }
  auto* out = static_cast<std::byte*>(to);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint16_t bits = dtype == Dtype::float16 ? to_half(values[i]) : to_bfloat(values[i]);
    std::memcpy(out + i * sizeof bits, &bits, sizeof bits);
  }
}

void decode(const void* stored, std::size_t count, Dtype dtype, float* to) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    switch (dtype) {
      case Dtype::float32: to[i] = at<float>(stored, i); break;
      case Dtype::float16: to[i] = from_half(at<std::uint16_t>(stored, i)); break;
      case Dtype::bfloat16: to[i] = from_bfloat(at<std::uint16_t>(stored, i)); break;
      case Dtype::int64: to[i] = static_cast<float>(at<std::int64_t>(stored, i)); break;
      case Dtype::uint8: to[i] = static_cast<float>(at<std::uint8_t>(stored, i)); break;
    }
  }
}

void round_to(Dtype dtype, float* values, std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    if (dtype == Dtype::float16) {
      values[i] = from_half(to_half(values[i]));
    } else if (dtype == Dtype::bfloat16) {
      values[i] = from_bfloat(to_bfloat(values[i]));
    }
  }
}

std::size_t not_finite(const void* stored, std::size_t count, Dtype dtype) noexcept {
  std::size_t found = 0;
  for (std::size_t i = 0; i < count; ++i) {
    switch (dtype) {
      case Dtype::float32: found += !std::isfinite(at<float>(stored, i)); break;
      case Dtype::float16: found += (at<std::uint16_t>(stored, i) & 0x7C00U) == 0x7C00U; break;
      case Dtype::bfloat16: found += (at<std::uint16_t>(stored, i) & 0x7F80U) == 0x7F80U; break;
      case Dtype::int64:
      case Dtype::uint8: break;
    }
  }
  return found;
}

void check_given(const void* stored, std::size_t count, Dtype dtype, const std::string& what) {
  if (const std::size_t found = not_finite(stored, count, dtype); found > 0) {
    throw Error(Code::request, what + " must be finite numbers in " + std::string(facts_of(dtype).name) + "; " +
                                   std::to_string(found) + " of " + std::to_string(count) + " are not finite");
  }
}

void check_computed(const void* stored, std::size_t count, Dtype dtype, const std::string& what) {
  if (const std::size_t found = not_finite(stored, count, dtype); found > 0) {
    throw Error(Code::engine, what + ": " + std::to_string(found) + " of " + std::to_string(count) +
                                  " values are not finite; " + advice);
  }
}

}  // namespace tgate
