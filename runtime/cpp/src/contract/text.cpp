#include "contract/text.h"

#include <algorithm>
#include <iterator>

#include "contract/unprintable.h"

namespace tgate {
namespace {

bool is_letter_of_a_name(char c, bool first) noexcept {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
         (c == '.' && !first);
}

}  // namespace

char32_t next_character(std::string_view text, std::size_t& at) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const std::size_t start = at++;
  const unsigned char lead = byte(start);
  if (lead < 0x80) return lead;
  const std::size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  if (length == 0 || text.size() - start < length) return no_character;
  char32_t character = lead & (0x7fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(start + i) & 0xc0) != 0x80) return no_character;
    character = character << 6 | (byte(start + i) & 0x3fu);
  }
  const bool overlong = (length == 3 && character < 0x800) || (length == 4 && character < 0x10000);
  if (overlong || (character >= 0xd800 && character < 0xe000) || character > 0x10ffff) return no_character;
  at = start + length;
  return character;
}

std::size_t characters(std::string_view text) noexcept {
  std::size_t count = 0;
  for (std::size_t at = 0; at < text.size(); ++count) next_character(text, at);
  return count;
}

bool is_printable(char32_t character) noexcept {
  if (character > 0x10ffff) return false;
  const auto range = std::lower_bound(std::begin(unprintable), std::end(unprintable), character,
                                      [](const CodePoints& points, char32_t wanted) { return points.last < wanted; });
  return range == std::end(unprintable) || character < range->first;
}

bool is_word(std::string_view text) noexcept {
  std::size_t count = 0;
  for (std::size_t at = 0; at < text.size(); ++count) {
    if (count == most_letters || !is_printable(next_character(text, at))) return false;
  }
  return count > 0;
}

bool is_plain_name(std::string_view text) noexcept {
  if (text.size() > most_letters) return false;
  bool first = true;  // of a part between slashes
  for (const char c : text) {
    if (c == '/' ? first : !is_letter_of_a_name(c, first)) return false;
    first = c == '/';
  }
  return !first;
}

}  // namespace tgate
