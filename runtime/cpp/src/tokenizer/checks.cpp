#include "tokenizer/checks.h"

#include <algorithm>

#include "contract/error.h"
#include "tokenizer/unicode.h"

namespace tgate::checks {
namespace {

std::string joined(std::initializer_list<std::string_view> known) {
  std::string line;
  for (const std::string_view each : known) line.append(line.empty() ? "" : " or ").append(each);
  return line;
}

bool is_one_of(std::string_view text, std::initializer_list<std::string_view> known) {
  return std::find(known.begin(), known.end(), text) != known.end();
}

}  // namespace

std::string Place::text() const {
  if (!around_) return "";
  const std::string before = around_->text();
  if (name_.data() == nullptr) return before + "[" + std::to_string(index_) + "]";
  return before + (before.empty() ? "" : ".") + shown(name_);
}

void refuse(const Place& place, const json::Value& value, std::string_view wanted) {
  const auto* text = value.as<std::string>();
  const std::string got = shown(text ? *text : json::canonical(value));
  refuse(place, " is " + got + ", wanted is " + std::string(wanted));
}

void refuse(const Place& place, const std::string& says) {
  const std::string where = place.text();
  throw Error(Code::bundle, (where.empty() ? "it" : where) + says);
}

const std::string& any_text(const json::Value& value, const Place& place) {
  const auto* found = value.as<std::string>();
  if (!found) refuse(place, value, "text");
  return *found;
}

const std::string& text(const json::Value& value, const Place& place) {
  const auto* found = value.as<std::string>();
  if (!found || found->empty() || found->size() > 4 * most_characters || unicode::count(*found) > most_characters) {
    refuse(place, value, "text of 1 to " + std::to_string(most_characters) + " characters");
  }
  return *found;
}

std::uint32_t id(const json::Value& value, const Place& place) {
  const auto* found = value.as<std::int64_t>();
  if (!found || *found < 0 || *found >= static_cast<std::int64_t>(most_tokens)) {
    refuse(place, value, "a whole number from 0 to " + std::to_string(most_tokens - 1));
  }
  return static_cast<std::uint32_t>(*found);
}

bool flag(const json::Value& value, const Place& place) {
  const auto* found = value.as<bool>();
  if (!found) refuse(place, value, "false or true");
  return *found;
}

const std::string& one_of(const json::Value& value, const Place& place, std::initializer_list<std::string_view> known) {
  const auto* found = value.as<std::string>();
  if (!found || !is_one_of(*found, known)) refuse(place, value, joined(known));
  return *found;
}

void nothing(const json::Value& value, const Place& place) {
  if (!value.as<std::nullptr_t>()) refuse(place, value, "null");
}

void no(const json::Value& value, const Place& place) {
  if (const auto* found = value.as<bool>(); !found || *found) refuse(place, value, "false");
}

const json::Object& object(const json::Value& value, const Place& place) {
  const auto* found = value.as<json::Object>();
  if (!found) refuse(place, value, "an object");
  return *found;
}

const json::Array& list(const json::Value& value, const Place& place, std::size_t most) {
  const auto* found = value.as<json::Array>();
  if (!found || found->size() > most) refuse(place, value, "a list of at most " + std::to_string(most));
  return *found;
}

const json::Object::value_type& one_field(const json::Value& value, const Place& place,
                                          std::initializer_list<std::string_view> known) {
  const json::Object& found = object(value, place);
  for (const auto& [name, each] : found) {
    if (!is_one_of(name, known)) refuse(Place(place, name), " is not known");
  }
  if (found.size() != 1) refuse(place, value, "one of " + joined(known));
  return found.front();
}

const std::string& kind(const json::Value& value, const Place& place, std::initializer_list<std::string_view> known) {
  object(value, place);
  static const json::Value none;
  const json::Value* found = value.find("type");
  return one_of(found ? *found : none, Place(place, "type"), known);
}

}  // namespace tgate::checks
