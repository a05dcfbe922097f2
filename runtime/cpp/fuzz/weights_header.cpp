// Reads the first bytes of a weight file: as they are, and behind a length that fits them, which chance seldom makes.

#include <string>

#include "contract/bundle.h"
#include "target.h"

namespace {

constexpr std::uint64_t tensor_bytes = 1 << 20;

void read(std::string_view head) {
  const std::uint64_t file_bytes = head.size() + tensor_bytes;
  fuzz::passes([&] {
    for (const auto& [name, place] : tgate::parse_places(head, file_bytes, "weights.safetensors")) {
      fuzz::promise(place.offset >= 8 && place.length >= 0);
      fuzz::promise(static_cast<std::uint64_t>(place.offset) + static_cast<std::uint64_t>(place.length) <= file_bytes);
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const std::string_view data = fuzz::text_of(bytes, size);
  read(data);
  std::string headed(8, '\0');
  const std::string_view header = data.substr(data.size() > 8 && data[8] == '{' ? 8 : 0);
  for (unsigned i = 0; i < 8; ++i) headed[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  read(headed.append(header));
  return 0;
}
