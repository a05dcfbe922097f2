#include "tokenizer/pre_tokenizers.h"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "tokenizer/unicode.h"

namespace tgate {
namespace {

constexpr std::string_view metaspace = "▁";

using Pieces = std::vector<Piece>;

/// Where a run of characters of a kind that begins at `at` ends.
template <class Is>
std::size_t run(std::string_view text, std::size_t at, const Is& is) {
  while (at < text.size()) {
    std::size_t next = at;
    if (!is(unicode::next(text, next))) break;
    at = next;
  }
  return at;
}

void add(Pieces& pieces, const Aligned& text, std::size_t begin, std::size_t end) {
  if (begin < end) pieces.push_back({text.slice(begin, end)});
}

bool is_sign(char32_t c) { return !unicode::is_space(c) && !unicode::is_letter(c) && !unicode::is_number(c); }

/// The length of an English ending that begins at `at`: 's, 't, 're, 've, 'm, 'll, 'd; 0 where none does.
std::size_t ending(std::string_view text, std::size_t at) {
  if (text[at] != '\'') return 0;
  for (const std::string_view each : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
    if (text.substr(at, each.size()) == each) return each.size();
  }
  return 0;
}

void cut(const Whitespace& /*unused*/, Aligned text, Pieces& pieces) {
  const std::string_view whole = text.text;
  for (std::size_t at = 0; at < whole.size();) {
    const std::size_t begin = at;
    const char32_t c = unicode::next(whole, at);
    if (unicode::is_word(c)) {
      at = run(whole, at, unicode::is_word);
    } else if (unicode::is_space(c)) {
      continue;
    } else {
      at = run(whole, at, [](char32_t next) { return !unicode::is_word(next) && !unicode::is_space(next); });
    }
    add(pieces, text, begin, at);
  }
}

void cut(const WhitespaceSplit& /*unused*/, Aligned text, Pieces& pieces) {
  for (std::size_t at = 0; at < text.text.size();) {
    const std::size_t end = run(text.text, at, [](char32_t c) { return !unicode::is_space(c); });
    add(pieces, text, at, end);
    at = run(text.text, end, unicode::is_space);
  }
}

void cut(const Metaspace& how, Aligned text, Pieces& pieces) {
  replace(text, metaspace, [](std::string_view whole, std::size_t at) {
    const std::size_t begin = whole.find(' ', at);
    return std::pair{begin, begin == std::string_view::npos ? begin : begin + 1};
  });
  const bool here = how.prepend == Metaspace::Prepend::always ||
                    (how.prepend == Metaspace::Prepend::first && text.from.front().begin == 0);
  if (here && text.text.compare(0, metaspace.size(), metaspace) != 0) text.prepend(metaspace);
  if (!how.split) {
    pieces.push_back({std::move(text)});
    return;
  }
  for (std::size_t at = 0; at < text.text.size();) {
    const std::size_t end = std::min(text.text.find(metaspace, at + 1), text.text.size());
    add(pieces, text, at, end);
    at = end;
  }
}

void cut(const ClipWords& how, Aligned text, Pieces& pieces) {
  const std::string_view whole = text.text;
  const auto word = [&](std::size_t at) {  // the end of the one that begins at `at`
    if (how.special && whole[at] == '<') {
      for (const std::string_view each : {"<|startoftext|>", "<|endoftext|>"}) {
        if (whole.substr(at, each.size()) == each) return at + each.size();
      }
    }
    if (const std::size_t length = ending(whole, at)) return at + length;
    std::size_t next = at;
    const char32_t c = unicode::next(whole, next);
    if (unicode::is_number(c)) return next;
    return unicode::is_letter(c) ? run(whole, next, unicode::is_letter) : run(whole, next, is_sign);
  };
  for (std::size_t at = run(whole, 0, unicode::is_space); at < whole.size(); at = run(whole, at, unicode::is_space)) {
    const std::size_t end = word(at);
    add(pieces, text, at, end);
    at = end;
  }
}

/// The end of GPT-2's word that begins at `at`: an ending; a run of letters, of numbers or of signs, with a space
/// before it; or spaces, the last one of them left to what follows.
std::size_t gpt2_word(std::string_view text, std::size_t at) {
  if (const std::size_t length = ending(text, at)) return at + length;
  std::size_t start = at;
  if (text[at] == ' ' && at + 1 < text.size()) ++start;
  std::size_t next = start;
  const char32_t c = unicode::next(text, next);
  if (unicode::is_letter(c)) return run(text, next, unicode::is_letter);
  if (unicode::is_number(c)) return run(text, next, unicode::is_number);
  if (!unicode::is_space(c)) return run(text, next, is_sign);
  std::size_t end = at, before_last = at;
  while (end < text.size()) {
    next = end;
    if (!unicode::is_space(unicode::next(text, next))) break;
    before_last = end;
    end = next;
  }
  return end == text.size() || before_last == at ? end : before_last;
}

/// The character that stands for each byte, in UTF-8: printable Latin ones for themselves, others from U+0100 on.
std::array<std::string, 256> characters_of_bytes() {
  std::array<std::string, 256> characters;
  char32_t other = 0x100;
  for (std::size_t byte = 0; byte < characters.size(); ++byte) {
    const bool plain = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
    unicode::append(characters[byte], plain ? static_cast<char32_t>(byte) : other++);
  }
  return characters;
}

void cut(const ByteLevel& how, Aligned text, Pieces& pieces) {
  static const std::array<std::string, 256> characters = characters_of_bytes();
  if (how.add_prefix_space && text.text.front() != ' ') text.prepend(" ");
  for (std::size_t at = 0; at < text.text.size();) {
    const std::size_t end = how.words ? gpt2_word(text.text, at) : text.text.size();
    Aligned written;
    written.text.reserve(2 * (end - at));
    written.from.reserve(2 * (end - at));
    for (; at < end; ++at) {
      const std::string& character = characters[static_cast<unsigned char>(text.text[at])];
      written.text += character;
      written.from.insert(written.from.end(), character.size(), text.from[at]);
    }
    pieces.push_back({std::move(written)});
  }
}

}  // namespace

void pre_tokenize(const std::vector<PreTokenizer>& pre_tokenizers, std::vector<Piece>& pieces) {
  for (const PreTokenizer& each : pre_tokenizers) {
    Pieces cut_up;
    cut_up.reserve(pieces.size());
    for (Piece& piece : pieces) {
      if (piece.id) {
        cut_up.push_back(std::move(piece));
      } else {
        std::visit([&](const auto& how) { cut(how, std::move(piece.text), cut_up); }, each);
      }
    }
    pieces = std::move(cut_up);
  }
}

}  // namespace tgate
