// Numbers in the dtypes of graphs, as Python's tgate_engine.dtypes rounds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "contract/dtypes.h"

namespace tgate {

/// float32 as float16 and bfloat16, rounded to the nearest, ties to even; what is too large becomes infinite.
std::uint16_t to_half(float value) noexcept;
std::uint16_t to_bfloat(float value) noexcept;
float from_half(std::uint16_t bits) noexcept;
float from_bfloat(std::uint16_t bits) noexcept;

/// `count` float32 numbers as a dtype of floats, into `to`. A float32 is copied.
void encode(const float* values, std::size_t count, Dtype dtype, void* to) noexcept;
/// What `stored` means, as float32.
void decode(const void* stored, std::size_t count, Dtype dtype, float* to) noexcept;

/// Rounds float32 numbers to what a dtype of floats holds.
void round_to(Dtype dtype, float* values, std::size_t count) noexcept;

/// How many of `count` stored numbers are infinite or no numbers.
std::size_t not_finite(const void* stored, std::size_t count, Dtype dtype) noexcept;
/// Throws Error of Code::request where numbers that a request brings are not finite; `what` names them.
void check_given(const void* stored, std::size_t count, Dtype dtype, const std::string& what);
/// Throws Error of Code::engine where numbers that a graph gave are not finite.
void check_computed(const void* stored, std::size_t count, Dtype dtype, const std::string& what);

}  // namespace tgate
