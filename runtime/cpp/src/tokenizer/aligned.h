// A text that knows where it came from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tgate {

/// Bytes of a prompt, from `begin` to before `end`.
struct Span {
  std::uint32_t begin, end;
};

/// A text made of a prompt, and for each of its bytes the part of the prompt that it stands for. Those are in the
/// prompt's order; the bytes of a character have the same one.
struct Aligned {
  std::string text;
  std::vector<Span> from;  // [text.size()]

  /// Bytes `begin` to before `end` of it, on the borders of characters.
  [[nodiscard]] Aligned slice(std::size_t begin, std::size_t end) const;
  /// Puts a text before a text that is not empty: it stands for what the first character stands for.
  void prepend(std::string_view text);
};

/// The whole of a prompt of less than 4 GiB.
Aligned aligned(std::string_view prompt);

/// A character of a new text, and what it is to the old one: 0 takes the next character's place, 1 is put in behind
/// the last one that was taken, -n takes a place and leaves n further characters out.
struct Change {
  char32_t character;
  int change;
};

/// Writes a text anew. `changes` take the places of no more characters than there are.
void rewrite(Aligned& text, const std::vector<Change>& changes);

/// Puts `content` in the place of parts of a text: `find(text, at)` gives the next part at or behind byte `at`, not
/// empty, or one that begins at npos. What is put in stands for the last byte of the part.
template <class Find>
void replace(Aligned& old, std::string_view content, const Find& find) {
  Aligned made;
  std::size_t at = 0;
  for (;;) {
    const auto [begin, end] = find(std::string_view(old.text), at);
    if (begin == std::string::npos) break;
    made.text.append(old.text, at, begin - at).append(content);
    made.from.insert(made.from.end(), old.from.begin() + static_cast<std::ptrdiff_t>(at),
                     old.from.begin() + static_cast<std::ptrdiff_t>(begin));
    made.from.insert(made.from.end(), content.size(), old.from[end - 1]);
    at = end;
  }
  if (!at) return;
  made.text.append(old.text, at);
  made.from.insert(made.from.end(), old.from.begin() + static_cast<std::ptrdiff_t>(at), old.from.end());
  old = std::move(made);
}

}  // namespace tgate
