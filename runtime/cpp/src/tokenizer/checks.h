// Reading the JSON of a stranger: each value is what is wanted, or is refused by where it stands.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "contract/json.h"

namespace tgate::checks {

/// How many tokens, added tokens and special tokens there may be, and how many characters a token may have.
inline constexpr std::size_t most_tokens = std::size_t{1} << 20, most_added = std::size_t{1} << 14, most_special = 16,
                             most_characters = 256;

/// Where a value stands, such as `model.vocab` or `added_tokens[3].id`; a view of the places around it. Made into text
/// only when it is asked for, which a sound file never does.
class Place {
 public:
  Place() = default;
  Place(const Place& around, std::string_view name) : around_(&around), name_(name) {}
  Place(const Place& around, std::size_t index) : around_(&around), index_(index) {}

  [[nodiscard]] std::string text() const;

 private:
  const Place* around_ = nullptr;
  std::string_view name_;
  std::size_t index_ = 0;
};

/// Throws Error of Code::bundle: "PLACE is VALUE, wanted is WANTED".
[[noreturn]] void refuse(const Place& place, const json::Value& value, std::string_view wanted);
/// Throws Error of Code::bundle: the place, and what is said of it.
[[noreturn]] void refuse(const Place& place, const std::string& says);

/// Text of any length.
const std::string& any_text(const json::Value& value, const Place& place);
/// Text of 1 to `most_characters` characters.
const std::string& text(const json::Value& value, const Place& place);
/// A whole number below `most_tokens`.
std::uint32_t id(const json::Value& value, const Place& place);
bool flag(const json::Value& value, const Place& place);
/// One of some texts.
const std::string& one_of(const json::Value& value, const Place& place, std::initializer_list<std::string_view> known);
/// Exactly null, or false.
void nothing(const json::Value& value, const Place& place);
void no(const json::Value& value, const Place& place);
const json::Object& object(const json::Value& value, const Place& place);
const json::Array& list(const json::Value& value, const Place& place, std::size_t most);

/// The values of an object that has exactly these members; `beside` is one that it may have, too.
template <std::size_t n>
std::array<const json::Value*, n> fields(const json::Value& value, const Place& place,
                                         const std::array<std::string_view, n>& names, std::string_view beside = {}) {
  std::array<const json::Value*, n> found{};
  for (const auto& [name, each] : object(value, place)) {
    std::size_t i = 0;
    while (i < n && names[i] != name) ++i;
    if (i < n) {
      found[i] = &each;
    } else if (beside.empty() || name != beside) {
      refuse(Place(place, name), " is not known");
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (!found[i]) refuse(Place(place, names[i]), " is missing");
  }
  return found;
}

/// The only member of an object, which has one of these names.
const json::Object::value_type& one_field(const json::Value& value, const Place& place,
                                          std::initializer_list<std::string_view> known);

/// The `type` of a component, which is one of these.
const std::string& kind(const json::Value& value, const Place& place, std::initializer_list<std::string_view> known);

}  // namespace tgate::checks
