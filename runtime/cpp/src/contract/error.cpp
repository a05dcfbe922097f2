#include "contract/error.h"

#include <cstdio>

#include "contract/text.h"

namespace tgate {
namespace {

/// Spaces that people write and that are called unprintable: the no-break one and the one of CJK texts.
bool is_a_space_of_texts(char32_t character) { return character == 0xa0 || character == 0x3000; }

std::string escaped(char32_t character) {
  switch (character) {
    case '\n': return "\\n";
    case '\r': return "\\r";
    case '\t': return "\\t";
    default: break;
  }
  char text[16];
  const auto number = static_cast<unsigned>(character);
  std::snprintf(text, sizeof text, number < 0x100 ? "\\x%02x" : number < 0x10000 ? "\\u%04x" : "\\U%08x", number);
  return text;
}

}  // namespace

std::string shown(std::string_view text, std::size_t most) {
  std::string line;
  std::size_t length = 0, before_last = 0;  // in characters of `line`; where its last one but `most` begins, in bytes
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    const char32_t character = next_character(text, at);
    const bool plain = character != no_character && (is_printable(character) || is_a_space_of_texts(character));
    const std::string escape =
        plain ? "" : escaped(character == no_character ? static_cast<unsigned char>(text[start]) : character);
    for (std::size_t i = 0; i < (plain ? 1 : escape.size()); ++i) {
      if (length == most) return line.substr(0, before_last) + "…";
      before_last = line.size();
      line += plain ? text.substr(start, at - start) : std::string_view(escape).substr(i, 1);
      ++length;
    }
  }
  return line;
}

bool is_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    if (next_character(text, at) == no_character) return false;
  }
  return true;
}

}  // namespace tgate
