#include "contract/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "contract/error.h"

namespace tgate::json {
namespace {

constexpr std::size_t most_depth = 100;
constexpr int out_of_range_number = 406;  // nlohmann's number for it

using Other = nlohmann::json;

bool is_whole(std::string_view digits) { return digits.find_first_of(".eE") == std::string_view::npos; }

std::string beyond(std::string_view digits) {
  const std::string number = shown(digits, 20);
  return is_whole(digits) ? number + " is no whole number of 64 bits" : number + " is beyond every number";
}

/// Builds the value while nlohmann's parser, which keeps no stack of calls, goes through the text. Says why it stopped.
class Builder : public nlohmann::json_sax<Other> {
 public:
  Value root;
  std::string why;

  bool null() override { return place(nullptr); }
  bool boolean(bool value) override { return place(value); }
  bool number_integer(number_integer_t value) override { return place(std::int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return stop(beyond(std::to_string(value)));
    }
    return place(static_cast<std::int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t& digits) override {
    return is_whole(digits) ? stop(beyond(digits)) : place(value);
  }
  bool string(string_t& value) override { return place(std::move(value)); }
  bool binary(binary_t&) override { return stop("it is no text"); }

  bool start_object(std::size_t) override { return enter(Object{}); }
  bool key(string_t& name) override {
    std::get<Object>(open_.back()->held).emplace_back().first = std::move(name);
    return true;
  }
  bool end_object() override {
    const Object& members = std::get<Object>(open_.back()->held);
    std::vector<std::string_view> names(members.size());
    std::transform(members.begin(), members.end(), names.begin(),
                   [](const auto& member) { return std::string_view(member.first); });
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) return stop("an object has the key '" + shown(*twice, 60) + "' twice");
    open_.pop_back();
    return true;
  }
  bool start_array(std::size_t) override { return enter(Array{}); }
  bool end_array() override {
    open_.pop_back();
    return true;
  }

  bool parse_error(std::size_t position, const std::string& read, const nlohmann::detail::exception& error) override {
    if (error.id == out_of_range_number) return stop(beyond(read));
    const char last = read.empty() ? '\0' : read.back();
    if (last == 'N' || last == 'I') return stop("NaN and Infinity are no numbers of JSON");
    return stop("it goes wrong at byte " + std::to_string(position) + ", after '" + shown(read, 20) + "'");
  }

 private:
  /// The arrays and objects that the next value is inside of. None grows while one inside of it is open, so none moves.
  std::vector<Value*> open_;

  bool stop(std::string text) {
    why = std::move(text);
    return false;
  }
  template <class T>
  bool place(T value) {
    next().held.emplace<T>(std::move(value));
    return true;
  }
  template <class T>
  bool enter(T value) {
    if (open_.size() == most_depth) return stop("it is nested more than " + std::to_string(most_depth) + " deep");
    Value& inner = next();
    inner.held.emplace<T>(std::move(value));
    open_.push_back(&inner);
    return true;
  }
  /// Where the next value goes.
  Value& next() {
    if (open_.empty()) return root;
    if (Array* array = std::get_if<Array>(&open_.back()->held)) return array->emplace_back();
    return std::get<Object>(open_.back()->held).back().second;
  }
};

void write_text(std::string_view text, std::string& out) {
  constexpr char digits[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    switch (c) {
      case '"': out += "\\\""; break;
      case '\\': out += "\\\\"; break;
      case '\n': out += "\\n"; break;
      case '\r': out += "\\r"; break;
      case '\t': out += "\\t"; break;
      case '\f': out += "\\f"; break;
      case '\b': out += "\\b"; break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += "\\u00";
          out += digits[c >> 4];
          out += digits[c & 15];
        } else {
          out += c;
        }
    }
  }
  out += '"';
}

void write(const Value& value, std::string& out) {
  if (const Object* object = value.as<Object>()) {
    std::vector<const std::pair<std::string, Value>*> members(object->size());
    std::transform(object->begin(), object->end(), members.begin(), [](const auto& member) { return &member; });
    // Bytes of UTF-8 sort as the characters do.
    std::sort(members.begin(), members.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
    char before = '{';
    for (const auto* member : members) {
      out += before;
      write_text(member->first, out);
      out += ':';
      write(member->second, out);
      before = ',';
    }
    out += members.empty() ? "{}" : "}";
  } else if (const Array* array = value.as<Array>()) {
    char before = '[';
    for (const Value& item : *array) {
      out += before;
      write(item, out);
      before = ',';
    }
    out += array->empty() ? "[]" : "]";
  } else if (const std::string* text = value.as<std::string>()) {
    write_text(*text, out);
  } else if (const std::int64_t* whole = value.as<std::int64_t>()) {
    out += std::to_string(*whole);
  } else if (const double* number = value.as<double>()) {
    out += repr(*number);
  } else if (const bool* flag = value.as<bool>()) {
    out += *flag ? "true" : "false";
  } else {
    out += "null";
  }
}

}  // namespace

const Value* Value::find(std::string_view key) const noexcept {
  if (const Object* object = as<Object>()) {
    for (const auto& [name, value] : *object) {
      if (name == key) return &value;
    }
  }
  return nullptr;
}

const char* Value::kind() const noexcept {
  constexpr const char* kinds[] = {"NoneType", "bool", "int", "float", "str", "list", "dict"};
  return kinds[held.index()];
}

Value parse(std::string_view text) {
  if (text.substr(0, 3) == "\xef\xbb\xbf") throw ParseError("it begins with a byte order mark (BOM)");
  // The parser takes a NUL for the text's end.
  const std::size_t nul = text.find('\0');
  if (nul != std::string_view::npos) throw ParseError("it holds a NUL, at byte " + std::to_string(nul + 1));
  Builder builder;
  if (!Other::sax_parse(text.begin(), text.end(), &builder)) throw ParseError(builder.why);
  return std::move(builder.root);
}

std::string canonical(const Value& value) {
  std::string out;
  write(value, out);
  return out;
}

std::string repr(double number) {
  if (!std::isfinite(number)) return std::isnan(number) ? "nan" : number < 0 ? "-inf" : "inf";
  // The shortest digits that give the number back: d.ddde±dd, which Python lays out anew.
  char text[32] = {};
  const auto end = std::to_chars(text, text + sizeof text, number, std::chars_format::scientific).ptr;
  std::string_view rest(text, static_cast<std::size_t>(end - text));
  std::string out;
  if (rest.front() == '-') {
    out = "-";
    rest.remove_prefix(1);
  }
  const std::size_t e = rest.find('e');
  std::string digits(rest.substr(0, 1));
  if (e > 2) digits += rest.substr(2, e - 2);
  const int exponent = std::atoi(rest.data() + e + 1);
  if (exponent < -4 || exponent >= 16) {
    out += digits.substr(0, 1);
    if (digits.size() > 1) out += "." + digits.substr(1);
    const std::string size = std::to_string(std::abs(exponent));
    return out + (exponent < 0 ? "e-" : "e+") + (size.size() < 2 ? "0" : "") + size;
  }
  if (exponent < 0) return out + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  const auto whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() < whole) digits.append(whole - digits.size(), '0');
  return out + digits.substr(0, whole) + "." + (digits.size() > whole ? digits.substr(whole) : "0");
}

}  // namespace tgate::json
