#include "tokenizer/charsmap.h"

#include <algorithm>
#include <cstddef>

#include "contract/error.h"

namespace tgate {
namespace {

constexpr std::size_t most_bytes = std::size_t{1} << 20;
constexpr std::size_t most_piece_bytes = 64;

// A unit of a double array holds its label in the lowest 8 bits, whether a leaf is among its children in bit 8, and its
// offset to its children above; a leaf has its highest bit set and holds a value. See Darts-clone.
constexpr std::uint32_t leaf_bit = 0x100, label_bits = 0x800000ff, value_bits = 0x7fffffff;

std::uint32_t offset(std::uint32_t unit) { return unit >> 10 << ((unit & 0x200) >> 6); }

std::uint32_t little_endian(const std::string& bytes, std::size_t at) {
  std::uint32_t number = 0;
  for (std::size_t i = 4; i--;) number = number << 8 | static_cast<unsigned char>(bytes[at + i]);
  return number;
}

/// Walks wherever bytes can lead to, and looks whether all that is inside.
void check_walks(const std::vector<std::uint32_t>& units, const std::string& texts, const std::string& where) {
  const auto refuse = [&](const char* says) { throw Error(Code::bundle, where + says); };
  const auto inside = [&](std::size_t place) {
    if (place >= units.size()) refuse(" leads out of its trie");
    return place;
  };
  std::vector<bool> seen(units.size());
  std::vector<std::size_t> waiting{offset(units[0])};  // places where the children of nodes begin
  while (!waiting.empty()) {
    const std::size_t place = inside(waiting.back());
    waiting.pop_back();
    for (std::uint32_t label = 1; label < 256; ++label) {
      const std::size_t child = place ^ label;
      if (seen[child] || (units[child] & label_bits) != label) continue;
      seen[child] = true;
      const std::size_t next = child ^ offset(units[child]);
      waiting.push_back(next);
      if (!(units[child] & leaf_bit)) continue;
      const std::size_t value = units[inside(next)] & value_bits;
      if (value > texts.size() || (value < texts.size() && (static_cast<unsigned char>(texts[value]) & 0xc0) == 0x80)) {
        refuse(" points beside its texts");
      }
    }
  }
}

}  // namespace

Charsmap Charsmap::parse(const std::string& bytes, const std::string& where) {
  const auto refuse = [&](const std::string& says) { throw Error(Code::bundle, where + says); };
  const std::size_t size = bytes.size() < 4 ? 0 : little_endian(bytes, 0);
  if (bytes.size() > most_bytes) {
    refuse(" holds " + std::to_string(bytes.size()) + " bytes, at most " + std::to_string(most_bytes) + " are read");
  }
  if (bytes.size() < 4 || size % 1024 || size == 0 || size > bytes.size() - 4) {
    refuse(" says that its trie takes " + std::to_string(size) + " of " + std::to_string(bytes.size()) + " bytes");
  }
  Charsmap map;
  map.texts_ = bytes.substr(4 + size);
  if (!is_utf8(map.texts_)) refuse(" is not UTF-8 where its texts are");
  for (std::size_t begin = 0; begin < map.texts_.size();) {
    const std::size_t end = std::min(map.texts_.find('\0', begin), map.texts_.size());
    if (end - begin > most_piece_bytes) {
      refuse(" makes more than " + std::to_string(most_piece_bytes) + " bytes of a character");
    }
    begin = end + 1;
  }
  map.units_.reserve(size / 4);
  for (std::size_t at = 4; at < 4 + size; at += 4) map.units_.push_back(little_endian(bytes, at));
  check_walks(map.units_, map.texts_, where);
  return map;
}

std::optional<std::string_view> Charsmap::find(std::string_view text) const noexcept {
  std::size_t place = offset(units_[0]);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (!byte) break;
    place ^= byte;
    const std::uint32_t unit = units_[place];
    if ((unit & label_bits) != byte) break;
    place ^= offset(unit);
    if (unit & leaf_bit) {
      const std::string_view rest = std::string_view(texts_).substr(units_[place] & value_bits);
      return rest.substr(0, rest.find('\0'));
    }
  }
  return std::nullopt;
}

std::optional<std::string> from_base64(std::string_view text) {
  if (text.size() % 4) return std::nullopt;
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  std::size_t padding = 0;
  while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    std::uint32_t value = 0;
    if (c >= 'A' && c <= 'Z') {
      value = static_cast<std::uint32_t>(c - 'A');
    } else if (c >= 'a' && c <= 'z') {
      value = static_cast<std::uint32_t>(c - 'a') + 26;
    } else if (c >= '0' && c <= '9') {
      value = static_cast<std::uint32_t>(c - '0') + 52;
    } else if (c == '+' || c == '/') {
      value = c == '+' ? 62 : 63;
    } else if (i + padding < text.size()) {
      return std::nullopt;
    }
    bits = bits << 6 | value;
    if (i % 4 == 3) {
      for (const std::uint32_t shift : {16U, 8U, 0U}) bytes += static_cast<char>(bits >> shift & 0xff);
    }
  }
  bytes.resize(bytes.size() - padding);
  return bytes;
}

}  // namespace tgate
