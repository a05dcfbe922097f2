#include "tokenizer/unicode.h"

#include <algorithm>
#include <iterator>

namespace tgate::unicode {
namespace {

struct Range {
  char32_t first, last;
};
/// Characters `step` apart, of which the first becomes `becomes` and the others follow.
struct Run {
  char32_t first, last, step, becomes;
};
struct Pair {
  char32_t a, b, c;
};
struct Classed {
  char32_t first, last;
  std::uint8_t number;
};
struct Decomposed {
  char32_t character, a, b, c, d;
};

#include "tokenizer/unicode.inc"

/// The row with the range that holds a character; null where there is none.
template <class Row, std::size_t n>
const Row* find(const Row (&rows)[n], char32_t character) noexcept {
  const auto* row = std::lower_bound(std::begin(rows), std::end(rows), character,
                                     [](const Row& each, char32_t c) { return each.last < c; });
  return row != std::end(rows) && row->first <= character ? row : nullptr;
}

enum Kind : std::uint8_t { letter = 1, number = 2, space = 4, word = 8 };

/// What there is to know of the characters that prompts are mostly made of, so that they are not searched for.
constexpr std::size_t common = 0x80;

std::array<std::uint8_t, common> kinds_of_common() noexcept {
  std::array<std::uint8_t, common> kinds{};
  for (char32_t c = 0; c < common; ++c) {
    kinds[c] = static_cast<std::uint8_t>((find(letters, c) ? letter : 0) | (find(numbers, c) ? number : 0) |
                                         (find(spaces, c) ? space : 0) | (find(word_characters, c) ? word : 0));
  }
  return kinds;
}

template <std::size_t n>
bool is(Kind kind, const Range (&rows)[n], char32_t character) noexcept {
  static const std::array<std::uint8_t, common> kinds = kinds_of_common();
  return character < common ? (kinds[character] & kind) != 0 : find(rows, character) != nullptr;
}

// Hangul, whose syllables are composed by arithmetic: leading consonants, vowels and trailing consonants.
constexpr char32_t first_syllable = 0xac00, first_l = 0x1100, first_v = 0x1161, before_t = 0x11a7;
constexpr char32_t ls = 19, vs = 21, ts = 28, syllables = ls * vs * ts;

}  // namespace

char32_t next(std::string_view text, std::size_t& at) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<char32_t>(static_cast<unsigned char>(text[at + i])); };
  const char32_t lead = byte(0);
  char32_t c = lead;
  std::size_t length = 1;
  if (lead >= 0xf0) {
    c = (lead & 7) << 18 | (byte(1) & 63) << 12 | (byte(2) & 63) << 6 | (byte(3) & 63);
    length = 4;
  } else if (lead >= 0xe0) {
    c = (lead & 15) << 12 | (byte(1) & 63) << 6 | (byte(2) & 63);
    length = 3;
  } else if (lead >= 0x80) {
    c = (lead & 31) << 6 | (byte(1) & 63);
    length = 2;
  }
  at += length;
  return c;
}

void append(std::string& text, char32_t c) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) return put(c);
  if (c < 0x800) {
    put(0xc0 | c >> 6);
  } else {
    if (c < 0x10000) {
      put(0xe0 | c >> 12);
    } else {
      put(0xf0 | c >> 18);
      put(0x80 | (c >> 12 & 63));
    }
    put(0x80 | (c >> 6 & 63));
  }
  put(0x80 | (c & 63));
}

std::size_t count(std::string_view text) noexcept {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

bool is_letter(char32_t character) noexcept { return is(letter, letters, character); }
bool is_number(char32_t character) noexcept { return is(number, numbers, character); }
bool is_space(char32_t character) noexcept { return is(space, spaces, character); }
bool is_word(char32_t character) noexcept { return is(word, word_characters, character); }

bool is_python_space(char32_t character) noexcept {
  return (character >= 0x1c && character <= 0x1f) || is_space(character);
}

bool is_private(char32_t character) noexcept { return character >= 0xe000 && character < 0xf900; }

Lower lowercase(char32_t character) noexcept {
  if (const Run* run = find(lowercase_runs, character); run && (character - run->first) % run->step == 0) {
    return {run->becomes + (character - run->first), 0};
  }
  for (const Pair& pair : lowercase_pairs) {
    if (pair.a == character) return {pair.b, pair.c};
  }
  return {character, 0};
}

std::uint8_t combining_class(char32_t character) noexcept {
  if (character < 0x300) return 0;
  const Classed* row = find(combining_classes, character);
  return row ? row->number : 0;
}

Parts decompose(char32_t character) noexcept {
  if (character < 0xc0) return {character, 0, 0, 0};
  if (character >= first_syllable && character < first_syllable + syllables) {
    const char32_t i = character - first_syllable, t = i % ts;
    return {first_l + i / (vs * ts), first_v + i / ts % vs, t ? before_t + t : 0, 0};
  }
  const auto* row = std::lower_bound(std::begin(decompositions), std::end(decompositions), character,
                                     [](const Decomposed& each, char32_t c) { return each.character < c; });
  if (row == std::end(decompositions) || row->character != character) return {character, 0, 0, 0};
  return {row->a, row->b, row->c, row->d};
}

char32_t compose(char32_t first, char32_t second) noexcept {
  if (second < 0x300) return 0;
  if (first >= first_l && first < first_l + ls && second >= first_v && second < first_v + vs) {
    return first_syllable + ((first - first_l) * vs + (second - first_v)) * ts;
  }
  if (first >= first_syllable && first < first_syllable + syllables && (first - first_syllable) % ts == 0 &&
      second > before_t && second < before_t + ts) {
    return first + (second - before_t);
  }
  const auto* row = std::lower_bound(
      std::begin(compositions), std::end(compositions), Pair{first, second, 0},
      [](const Pair& each, const Pair& sought) { return each.a != sought.a ? each.a < sought.a : each.b < sought.b; });
  return row != std::end(compositions) && row->a == first && row->b == second ? row->c : 0;
}

namespace {

/// How a character acts on the borders of graphemes: the numbers of the table, and two that need none.
enum class Border : std::uint8_t {
  other, control, extend, spacing, prepend, picture, consonant, linker, l, v, t, lv, lvt, joiner
};

Border border(char32_t c) noexcept {
  if (c == 0x200d) return Border::joiner;
  const Classed* row = find(grapheme_classes, c);
  return row ? static_cast<Border>(row->number) : Border::other;
}

/// The rules of Unicode's annex 29, GB3 to GB11, over one character after the other.
class Borders {
 public:
  /// Whether a grapheme ends before `c`, which comes next.
  bool before(char32_t c) noexcept {
    const Border b = border(c);
    const bool ends = breaks(c, b);
    remember(c, b);
    return ends;
  }

 private:
  [[nodiscard]] bool breaks(char32_t c, Border b) const noexcept {
    if (last_ == '\r' && c == '\n') return false;
    if (border_ == Border::control || b == Border::control) return true;
    switch (b) {
      case Border::extend:
      case Border::linker:
      case Border::joiner:
      case Border::spacing: return false;
      case Border::l:
      case Border::lv:
      case Border::lvt:
        if (border_ == Border::l) return false;
        break;
      case Border::v:
        if (border_ == Border::l || border_ == Border::lv || border_ == Border::v) return false;
        break;
      case Border::t:
        if (border_ >= Border::v && border_ <= Border::lvt) return false;
        break;
      case Border::consonant:
        if (linked_) return false;
        break;
      case Border::picture:
        if (border_ == Border::joiner && joined_picture_) return false;
        break;
      default: break;
    }
    return border_ != Border::prepend;
  }

  void remember(char32_t c, Border b) noexcept {
    const bool extends = b == Border::extend || b == Border::linker;
    joined_picture_ = b == Border::joiner && picture_;
    picture_ = b == Border::picture || (picture_ && extends);
    // The zero-width non-joiner extends, and yet parts conjuncts.
    const bool conjoins = (extends || b == Border::joiner) && c != 0x200c;
    linked_ = consonant_ && conjoins && (linked_ || b == Border::linker);
    consonant_ = b == Border::consonant || (consonant_ && conjoins);
    last_ = c;
    border_ = b;
  }

  char32_t last_ = 0;
  Border border_ = Border::control;
  bool picture_ = false;         // a picture, and nothing but what extends it
  bool joined_picture_ = false;  // the same, and a joiner
  bool consonant_ = false;       // a consonant, and nothing but what extends it
  bool linked_ = false;          // the same, a linker among that
};

}  // namespace

std::vector<std::size_t> grapheme_ends(std::string_view text) {
  std::vector<std::size_t> ends;
  Borders borders;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    if (borders.before(next(text, at)) && start) ends.push_back(start);
  }
  if (!text.empty()) ends.push_back(text.size());
  return ends;
}

}  // namespace tgate::unicode
