// Characters as the `tokenizers` library sees them, which mixes several versions of Unicode: scripts/make_unicode.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tgate::unicode {

/// The character at byte `at` of UTF-8, which moves behind it. The text has been checked (`is_utf8`).
char32_t next(std::string_view text, std::size_t& at) noexcept;

/// Appends a character's UTF-8.
void append(std::string& text, char32_t character);

/// How many characters valid UTF-8 has.
std::size_t count(std::string_view text) noexcept;

bool is_letter(char32_t character) noexcept;  ///< \p{L}
bool is_number(char32_t character) noexcept;  ///< \p{N}
bool is_space(char32_t character) noexcept;   ///< \s
bool is_word(char32_t character) noexcept;    ///< \w

/// What Python's `str.isspace` says, which knows four more spaces than `is_space`.
bool is_python_space(char32_t character) noexcept;

/// Whether the character means nothing in Unicode and stands for vectors of textual inversions: U+E000 to U+F8FF.
bool is_private(char32_t character) noexcept;

/// One or two characters; the second is 0 where there is one.
using Lower = std::array<char32_t, 2>;
Lower lowercase(char32_t character) noexcept;

/// The canonical combining class.
std::uint8_t combining_class(char32_t character) noexcept;

/// The whole canonical decomposition, up to four characters and zeros behind them; the character itself where it has
/// none.
using Parts = std::array<char32_t, 4>;
Parts decompose(char32_t character) noexcept;

/// What a pair of characters is composed to; 0 where it is not.
char32_t compose(char32_t first, char32_t second) noexcept;

/// The ends, in bytes, of the extended grapheme clusters of valid UTF-8. Pairs of regional indicators are left apart:
/// a cluster of them is longer than what `Charsmap` looks up as one.
std::vector<std::size_t> grapheme_ends(std::string_view text);

}  // namespace tgate::unicode
