// Where the tensors of a weight file lie, as runtime/tgate_runtime/weights.py reads it.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "contract/product.h"
#include "contract/reader.h"

namespace tgate {
namespace {

constexpr std::string_view advice = "export the bundle again";
constexpr std::size_t word = 8;  // the header's length comes first, as so many bytes
constexpr std::uint64_t most_header_bytes = 64U << 20;

constexpr struct Tags {
  Spelling<Dtype> all[std::size(dtypes)]{};
  constexpr Tags() {
    for (std::size_t i = 0; i < std::size(dtypes); ++i) all[i] = {dtypes[i].safetensors, dtypes[i].dtype};
  }
} tags;

/// What is odd, for parse_places to say of which file.
Error odd(const std::string& what) { return {Code::bundle, what}; }

std::string listed(const std::vector<std::int64_t>& sizes) {
  std::string text = "[";
  for (const std::int64_t size : sizes) {
    if (text.size() > 60) return text.substr(0, 60);
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

/// One tensor's place. `first`, `end`: where tensors begin, and the file ends, in bytes.
Placed place_of(Reader entry, std::int64_t first, std::int64_t end) {
  const Dtype dtype = entry.choice("dtype", tags.all);
  std::vector<std::int64_t> shape = entry.wholes("shape", largest_whole, 0);
  const std::vector<std::int64_t> offsets = entry.wholes("data_offsets", largest_whole, 0);
  const std::int64_t length = product(shape, static_cast<std::int64_t>(facts_of(dtype).bytes));
  // No difference overflows: none of the numbers is below 0.
  if (offsets.size() != 2 || length < 0 || offsets[1] - offsets[0] != length || offsets[1] > end - first) {
    throw odd(entry.where() + " of shape " + listed(shape) + " has " + listed(offsets) + " of " +
                 std::to_string(end - first) + " bytes");
  }
  return {dtype, std::move(shape), first + offsets[0], length};
}

Places places_of(std::string_view head, std::uint64_t file_bytes) {
  if (head.size() < word || file_bytes < word) throw odd("it ends in its first word");
  std::uint64_t header_bytes = 0;
  for (std::size_t i = 0; i < word; ++i) {
    header_bytes |= std::uint64_t{static_cast<unsigned char>(head[i])} << (8 * i);
  }
  if (header_bytes > most_header_bytes) {
    throw odd("its header would hold " + std::to_string(header_bytes) + " bytes, of at most " +
                 std::to_string(most_header_bytes));
  }
  head.remove_prefix(word);
  if (header_bytes > head.size() || header_bytes > file_bytes - word) throw odd("it ends in its header");
  const json::Value header = json::parse(head.substr(0, static_cast<std::size_t>(header_bytes)));
  const Reader reader(header, "its header", Code::bundle, advice);
  const auto first = static_cast<std::int64_t>(word + header_bytes);
  const auto end = static_cast<std::int64_t>(std::min<std::uint64_t>(file_bytes, INT64_MAX));
  Places places;
  for (const auto& [name, value] : *header.as<json::Object>()) {
    if (name == "__metadata__") continue;
    places.emplace(name, place_of(Reader(value, "tensor '" + shown(name, 60) + "'", Code::bundle, advice), first, end));
  }
  return places;
}

}  // namespace

Places parse_places(std::string_view head, std::uint64_t file_bytes, const std::string& name) {
  std::string why;
  try {
    return places_of(head, file_bytes);
  } catch (const Error& error) {
    why = error.what();
  } catch (const json::ParseError& error) {
    why = error.what();
  }
  throw odd(name + " is not a whole weight file (" + shown(why, 200) + "); " + std::string(advice));
}

}  // namespace tgate
