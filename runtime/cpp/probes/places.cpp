// Reads headers of weight files: a P record is the first bytes of one, after eight bytes that say how large it is,
// lowest first. A line says {name: [dtype, [sizes], offset, length]} as JSON, or why not.

#include <cstdint>
#include <iostream>
#include <string>
#include <string_view>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "records.h"

namespace {

using tgate::json::Array;
using tgate::json::Value;

Value number(std::int64_t value) { return {value}; }

std::string answer(std::string_view bytes) {
  std::uint64_t file_bytes = 0;
  for (unsigned i = 0; i < 8; ++i) file_bytes |= std::uint64_t{static_cast<unsigned char>(bytes.at(i))} << (8 * i);
  try {
    tgate::json::Object places;
    for (const auto& [name, place] : tgate::parse_places(bytes.substr(8), file_bytes, "weights.safetensors")) {
      Array sizes;
      for (const std::int64_t size : place.shape) sizes.push_back(number(size));
      const auto dtype = std::string(tgate::facts_of(place.dtype).name);
      Array entry{{dtype}, {sizes}, number(place.offset), number(place.length)};
      places.emplace_back(name, Value{std::move(entry)});
    }
    return tgate::json::canonical(Value{std::move(places)});
  } catch (const tgate::Error& error) {
    return error.what();
  }
}

}  // namespace

int main() {
  probe::Record record;
  while (probe::read_record(record)) std::cout << answer(record.bytes) << '\n';
}
