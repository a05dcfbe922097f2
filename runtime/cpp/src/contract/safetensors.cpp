// Where the tensors of a weight file lie, as runtime/tgate_runtime/weights.py reads it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "contract/product.h"

namespace tgate {
namespace {

constexpr std::size_t word = 8;  // the header's length comes first, as so many bytes
constexpr std::uint64_t most_header_bytes = 64U << 20;

using Sizes = std::vector<std::int64_t>;

/// One line that says what is odd in a header. Caught in this file.
class Oddity : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

std::string listed(const Sizes& sizes) {
  std::string text = "[";
  for (const std::int64_t size : sizes) {
    if (text.size() > 60) return text.substr(0, 60);
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

/// Typed access to the entry of one tensor.
class Entry {
 public:
  Entry(const json::Value& value, const std::string& where) : value_(value), where_(where) {
    if (value.as<json::Object>() == nullptr) {
      throw Oddity(where + ": expected dict, got " + std::string(value.kind()));
    }
  }

  [[nodiscard]] const DtypeFacts& dtype() const {
    const auto& tag = get<std::string>("dtype", "str");
    std::string known;
    for (const DtypeFacts& facts : dtypes) {
      if (tag == facts.safetensors) return facts;
      known += (known.empty() ? "" : ", ") + std::string(facts.safetensors);
    }
    throw Oddity(where_ + ".dtype: expected one of " + known + ", got '" + shown(tag, 60) + "'");
  }

  /// Whole numbers of at least 0.
  [[nodiscard]] Sizes sizes(const char* key) const {
    Sizes sizes;
    for (const json::Value& item : get<json::Array>(key, "list")) {
      const auto* const size = item.as<std::int64_t>();
      if (size == nullptr || *size < 0) {
        throw Oddity(where_ + "." + key + ": expected whole numbers of at least 0, got " +
                     (size == nullptr ? item.kind() : std::to_string(*size)));
      }
      sizes.push_back(*size);
    }
    return sizes;
  }

 private:
  template <class T>
  [[nodiscard]] const T& get(const char* key, const char* kind) const {
    const json::Value* const value = value_.find(key);
    if (value == nullptr) throw Oddity(where_ + ": '" + key + "' is missing");
    if (const T* const held = value->as<T>()) return *held;
    throw Oddity(where_ + "." + key + ": expected " + kind + ", got " + value->kind());
  }

  const json::Value& value_;
  const std::string& where_;
};

/// One tensor's place. `first`, `end`: where tensors begin, and the file ends, in bytes.
Placed place_of(const json::Value& value, const std::string& where, std::int64_t first, std::int64_t end) {
  const Entry entry(value, where);
  const DtypeFacts& dtype = entry.dtype();
  Sizes shape = entry.sizes("shape");
  const Sizes offsets = entry.sizes("data_offsets");
  const std::int64_t length = product(shape, static_cast<std::int64_t>(dtype.bytes));
  // Neither difference overflows: none of the numbers is below 0.
  if (offsets.size() != 2 || length < 0 || offsets[1] - offsets[0] != length || offsets[1] > end - first) {
    throw Oddity(where + " of shape " + listed(shape) + " has " + listed(offsets) + " of " +
                 std::to_string(end - first) + " bytes");
  }
  return {dtype.dtype, std::move(shape), first + offsets[0], length};
}

Places places_of(std::string_view head, std::uint64_t file_bytes) {
  if (head.size() < word || file_bytes < word) throw Oddity("it ends in its first word");
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < word; ++i) {
    header_bytes |= std::uint64_t{static_cast<unsigned char>(head[i])} << (8 * i);
  }
  if (header_bytes > most_header_bytes) {
    throw Oddity("its header would hold " + std::to_string(header_bytes) + " bytes, of at most " +
                 std::to_string(most_header_bytes));
  }
  head.remove_prefix(word);
  if (header_bytes > head.size() || header_bytes > file_bytes - word) throw Oddity("it ends in its header");
  const json::Value header = json::parse(head.substr(0, static_cast<std::size_t>(header_bytes)));
  const auto* const entries = header.as<json::Object>();
  if (entries == nullptr) throw Oddity("its header: expected an object, got " + std::string(header.kind()));
  const auto first = static_cast<std::int64_t>(word + header_bytes);
  const auto end = static_cast<std::int64_t>(std::min<std::uint64_t>(file_bytes, INT64_MAX));
  Places places;
  for (const auto& [name, value] : *entries) {
    if (name == "__metadata__") continue;
    places.emplace(name, place_of(value, "tensor '" + shown(name, 60) + "'", first, end));
  }
  return places;
}

}  // namespace

Places parse_places(std::string_view head, std::uint64_t file_bytes, const std::string& name) {
  const auto damaged = [&](const std::string& why) {
    return Error(Code::bundle, name + " is not a whole weight file (" + why.substr(0, 200) + "); export the bundle again");
  };
  try {
    return places_of(head, file_bytes);
  } catch (const Oddity& odd) {
    throw damaged(odd.what());
  } catch (const json::ParseError& odd) {
    throw damaged(odd.what());
  }
}

}  // namespace tgate
