// The dtypes of a bundle, in one table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tgate {

enum class Dtype : std::uint8_t { float32, float16, bfloat16, int64, uint8 };

struct DtypeFacts {
  Dtype dtype;
  std::string_view name;         ///< in a manifest
  std::string_view safetensors;  ///< its tag there
  std::int32_t onnx;             ///< its number in TensorProto.DataType
  std::size_t bytes;             ///< of one element
};

inline constexpr DtypeFacts dtypes[] = {
    {Dtype::float32, "float32", "F32", 1, 4}, {Dtype::float16, "float16", "F16", 10, 2},
    {Dtype::bfloat16, "bfloat16", "BF16", 16, 2}, {Dtype::int64, "int64", "I64", 7, 8},
    {Dtype::uint8, "uint8", "U8", 2, 1},
};

constexpr const DtypeFacts& facts_of(Dtype dtype) { return dtypes[static_cast<std::size_t>(dtype)]; }

}  // namespace tgate
