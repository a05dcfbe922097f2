// JSON that nobody vouches for, parsed strictly: one text means one thing, here and in Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tgate::json {

struct Value;
using Array = std::vector<Value>;
/// Members in the text's order; no key is there twice.
using Object = std::vector<std::pair<std::string, Value>>;

/// A value. Whole numbers and others are two kinds, as the text spells them: 1 and 1.0.
struct Value {
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> held{nullptr};

  template <class T>
  [[nodiscard]] const T* as() const noexcept {
    return std::get_if<T>(&held);
  }
  /// A member of an object; null where it is none, or has no such member.
  [[nodiscard]] const Value* find(std::string_view key) const noexcept;
  /// Python's word for the kind: "dict", "list", "str", "int", "float", "bool", "NoneType".
  [[nodiscard]] const char* kind() const noexcept;
};

/// One line that says why a text is not taken.
class ParseError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The value of a JSON text in UTF-8. Throws ParseError for a text that is none, for a key that an object has twice,
/// for numbers that are not finite or, whole, not of 64 bits, for half a surrogate pair, for a byte order mark, and for
/// what is nested more than 100 deep.
Value parse(std::string_view text);

/// The value as Python's `json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` writes it: what
/// a manifest's digest is made of.
std::string canonical(const Value& value);

/// A number as Python's `repr` writes it.
std::string repr(double number);

}  // namespace tgate::json
