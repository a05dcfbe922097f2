// What a graph's operators may be, and be given: the tables of tgate_engine/onnx_operators.py.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace tgate::onnx {

/// What an attribute of a name is, whatever operator has it. `type` is its number in AttributeProto.AttributeType.
struct Rule {
  std::string_view name;
  std::int32_t type;          ///< 1, finite; 2, a whole number; 3, a text; 7, whole numbers
  std::int64_t least, most;   ///< of whole numbers; of letters, where a text is made of `letters`
  std::uint64_t numbers;      ///< a bit for each number there may be; 0 where it may be any from least to most
  std::string_view words;     ///< what a text may be, with spaces between
  std::string_view letters;   ///< what a text may be made of; empty where it is one of `words`
};

struct Operator {
  std::string_view name;
  std::string_view inputs;    ///< a 1 for one that has to be there, a ? for one that may be, at the end a * for more
  std::size_t most_outputs;   ///< the first has to be there
  bool lowered;               ///< of ONNX Runtime's own domain, in a graph that was lowered for CUDA
  const Rule* attributes[10];  ///< ended by null
};

/// The value of an attribute, which is one of them: the others are at their defaults.
struct Value {
  std::int32_t type{};
  float number{};
  std::int64_t whole{};
  std::string_view text;
  std::vector<std::int64_t> several;
};

/// Null where no graph may hold it. Those of ONNX Runtime's own domain a graph may hold that was `lowered`.
const Operator* find_operator(std::string_view domain, std::string_view name, bool lowered) noexcept;

/// Whether an import is that of ONNX Runtime's own domain.
bool is_contrib(std::string_view domain, std::int64_t version) noexcept;

/// Whether an operator may have inputs and outputs of those names, an empty one being left out.
bool takes(const Operator& known, const std::vector<std::string_view>& inputs,
           const std::vector<std::string_view>& outputs) noexcept;

/// Whether an operator may have an attribute of that name and value.
bool may_say(const Operator& known, std::string_view name, const Value& value) noexcept;

}  // namespace tgate::onnx
