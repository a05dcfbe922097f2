#include "contract/reader.h"

#include <algorithm>
#include <cmath>

#include "contract/text.h"

namespace tgate {
namespace {

constexpr std::size_t most_text = 4096;   // characters
constexpr std::size_t most_shown = 60;    // of a value
constexpr std::size_t most_quoted = 100;  // entries of a list or an object that are looked at to show it

std::string expected_name(std::string_view got) {
  return "expected a name of 1 to " + std::to_string(most_letters) + " printable characters, got '" +
         shown(got, most_shown) + "'";
}

}  // namespace

Reader::Reader(const json::Value& value, std::string where, Code code, std::string_view advice)
    : object_(value.as<json::Object>()), where_(std::move(where)), code_(code), advice_(advice) {
  if (!object_) fail("", std::string("expected an object, got ") + value.kind());
}

void Reader::fail(std::string_view place, const std::string& wrong) const {
  throw Error(code_, shown(where_, 300) + shown(place, most_shown) + ": " + wrong + "; " + std::string(advice_));
}

bool Reader::has(std::string_view key) const {
  return std::any_of(object_->begin(), object_->end(), [&](const auto& member) { return member.first == key; });
}

const json::Value& Reader::get(std::string_view key) {
  for (const auto& [name, value] : *object_) {
    if (name == key) {
      asked_.push_back(name);
      return value;
    }
  }
  fail("", "'" + std::string(key) + "' is missing");
}

const json::Value& Reader::wanted(std::string_view key, const char* kinds) {
  const json::Value& value = get(key);
  if (std::string_view(kinds).find(value.kind()) == std::string_view::npos) {
    fail("." + std::string(key), std::string("expected ") + kinds + ", got " + quoted(value));
  }
  return value;
}

void Reader::refuse_others() const {
  for (const auto& member : *object_) {
    if (std::find(asked_.begin(), asked_.end(), member.first) == asked_.end()) {
      fail("", "'" + shown(member.first, most_shown) + "' is not known here");
    }
  }
}

std::string Reader::text(std::string_view key) {
  const std::string& value = *wanted(key, "str").as<std::string>();
  if (value.size() > most_text) {
    const std::size_t count = characters(value);
    if (count > most_text) {
      fail("." + std::string(key),
           "expected at most " + std::to_string(most_text) + " characters, got " + std::to_string(count));
    }
  }
  return value;
}

std::string Reader::word(std::string_view key) {
  std::string value = text(key);
  if (!is_word(value)) fail("." + std::string(key), expected_name(value));
  return value;
}

std::string Reader::name(std::string_view key) { return check_name(text(key)); }

std::int64_t Reader::whole(std::string_view key, std::int64_t least, std::int64_t most) {
  const std::int64_t value = *wanted(key, "int").as<std::int64_t>();
  if (value < least || value > most) {
    fail("." + std::string(key), (value < least ? "expected at least " + std::to_string(least)
                                                : "expected at most " + std::to_string(most)) +
                                     ", got " + std::to_string(value));
  }
  return value;
}

double Reader::number(std::string_view key, double least, double most) {
  const json::Value& value = wanted(key, "int or float");
  const std::int64_t* whole = value.as<std::int64_t>();
  const double number = whole ? static_cast<double>(*whole) : *value.as<double>();
  if (!(std::abs(number) <= largest_number)) {
    fail("." + std::string(key), "expected a finite number, of float32, got " + json::repr(number));
  }
  if (number < least || number > most) {
    fail("." + std::string(key),
         "expected " + json::repr(least) + " to " + json::repr(most) + ", got " + json::repr(number));
  }
  return number;
}

bool Reader::flag(std::string_view key) { return *wanted(key, "bool").as<bool>(); }

std::vector<std::int64_t> Reader::wholes(std::string_view key, std::int64_t most, std::int64_t least) {
  std::vector<std::int64_t> values;
  for (const json::Value& value : list(key)) {
    const std::int64_t* whole = value.as<std::int64_t>();
    if (!whole || *whole < least || *whole > most) {
      fail("." + std::string(key), "expected whole numbers from " + std::to_string(least) + " to " +
                                       std::to_string(most) + ", got " + quoted(value));
    }
    values.push_back(*whole);
  }
  return values;
}

std::vector<double> Reader::numbers_of(const json::Value& value, const std::string& place) const {
  const json::Array* list = value.as<json::Array>();
  if (!list) fail(place, "expected list, got " + quoted(value));
  std::vector<double> values;
  for (const json::Value& item : *list) {
    const std::int64_t* whole = item.as<std::int64_t>();
    const double* number = item.as<double>();
    if ((!whole && !number) || (number && std::abs(*number) > largest_number)) {
      fail(place, "expected finite numbers, of float32, got " + quoted(item));
    }
    values.push_back(whole ? static_cast<double>(*whole) : *number);
  }
  return values;
}

std::vector<std::string> Reader::words(std::string_view key) {
  std::vector<std::string> names;
  for (const json::Value& value : list(key)) {
    const std::string* name = value.as<std::string>();
    if (!name || !is_word(*name)) {
      fail("." + std::string(key), expected_name(name ? *name : quoted(value)));
    }
    names.push_back(*name);
  }
  std::vector<std::string_view> sorted(names.begin(), names.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    fail("." + std::string(key), "expected names that differ, got '" + shown(*twice, most_shown) + "' twice");
  }
  return names;
}

const json::Array& Reader::list(std::string_view key, std::size_t most) {
  const json::Array& values = *wanted(key, "list").as<json::Array>();
  if (values.size() > most) {
    fail("." + std::string(key),
         "expected at most " + std::to_string(most) + " entries, got " + std::to_string(values.size()));
  }
  return values;
}

const json::Object& Reader::object(std::string_view key) { return *wanted(key, "dict").as<json::Object>(); }

const json::Object& Reader::named(std::string_view key, std::size_t most) {
  const json::Object& values = object(key);
  if (values.size() > most) {
    fail("." + std::string(key),
         "expected at most " + std::to_string(most) + " entries, got " + std::to_string(values.size()));
  }
  for (const auto& member : values) {
    if (!is_word(member.first)) fail("." + std::string(key), expected_name(member.first));
  }
  return values;
}

void Reader::check_facts(const json::Value& value, const std::string& place) const {
  const json::Object* facts = value.as<json::Object>();
  if (!facts) fail(place, "expected dict, got " + quoted(value));
  for (const auto& [name, fact] : *facts) {
    if (!is_word(name)) fail(place, expected_name(name));
    if (fact.as<json::Array>() || fact.as<json::Object>()) {
      fail(place + "." + name, "expected a text, a number, true, false or null, got " + quoted(fact));
    }
  }
}

Reader Reader::inner(std::string_view key) {
  return Reader(get(key), where_ + "." + std::string(key), code_, advice_);
}

void check_unique(std::vector<std::string_view> names, const std::string& where) {
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice == names.end()) return;
  throw Error(Code::bundle, where + ": '" + shown(*twice, most_shown) + "' is there twice; export the bundle again");
}

const std::string& check_name(const std::string& name) {
  if (is_plain_name(name)) return name;
  throw Error(Code::bundle, "file name '" + shown(name, most_shown) +
                                "' is not a plain name inside the bundle; the bundle is not trustworthy");
}

std::string quoted(const json::Value& value) {
  if (const std::string* text = value.as<std::string>()) return "'" + shown(*text, most_shown) + "'";
  const json::Array* array = value.as<json::Array>();
  const json::Object* object = value.as<json::Object>();
  if ((array && array->size() > most_quoted) || (object && object->size() > most_quoted)) {
    return std::string(value.kind()) + " of " + std::to_string(array ? array->size() : object->size()) + " entries";
  }
  return shown(json::canonical(value), most_shown);
}

}  // namespace tgate
