#include "tokenizer/aligned.h"

#include "tokenizer/unicode.h"

namespace tgate {

Aligned Aligned::slice(std::size_t begin, std::size_t end) const {
  return {text.substr(begin, end - begin),
          {from.begin() + static_cast<std::ptrdiff_t>(begin), from.begin() + static_cast<std::ptrdiff_t>(end)}};
}

void Aligned::prepend(std::string_view before) {
  const Span first = from.front();
  text.insert(0, before);
  from.insert(from.begin(), before.size(), first);
}

Aligned aligned(std::string_view prompt) {
  Aligned whole{std::string(prompt), {}};
  whole.from.reserve(prompt.size());
  for (std::size_t at = 0; at < prompt.size();) {
    const std::size_t start = at;
    unicode::next(prompt, at);
    const Span character{static_cast<std::uint32_t>(start), static_cast<std::uint32_t>(at)};
    whole.from.insert(whole.from.end(), at - start, character);
  }
  return whole;
}

void rewrite(Aligned& old, const std::vector<Change>& changes) {
  Aligned made;
  made.text.reserve(old.text.size());
  made.from.reserve(old.text.size());
  std::size_t at = 0;  // where the next character of the old text begins
  for (const auto& [character, change] : changes) {
    // Nothing is put in before the first character that is taken.
    const Span from = change > 0 ? old.from[at ? at - 1 : 0] : old.from[at];
    for (int taken = 0; taken < 1 - change; ++taken) unicode::next(old.text, at);
    const std::size_t size = made.text.size();
    unicode::append(made.text, character);
    made.from.insert(made.from.end(), made.text.size() - size, from);
  }
  old = std::move(made);
}

}  // namespace tgate
