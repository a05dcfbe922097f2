// Texts of strangers, character by character.
#pragma once

#include <cstddef>
#include <string_view>

namespace tgate {

/// How many characters a name may have.
inline constexpr std::size_t most_letters = 200;

/// What `next_character` gives for a byte that begins no character.
inline constexpr char32_t no_character = 0xffffffff;

/// The character that begins at `at`, which moves behind it: a code point of well-formed UTF-8 (RFC 3629), or
/// `no_character` for one byte that begins none. `at` must be inside the text.
char32_t next_character(std::string_view text, std::size_t& at) noexcept;

/// How many characters a text has; a byte that begins none counts for one.
std::size_t characters(std::string_view text) noexcept;

/// Whether it can be shown in a line as it is: what Python's `str.isprintable` says of a character.
bool is_printable(char32_t character) noexcept;

/// Whether a text is a name: printable, not empty, and of at most `most_letters` characters.
bool is_word(std::string_view text) noexcept;

/// Whether a text is a plain relative name inside a bundle, such as "tokenizer/0.json".
bool is_plain_name(std::string_view text) noexcept;

}  // namespace tgate
