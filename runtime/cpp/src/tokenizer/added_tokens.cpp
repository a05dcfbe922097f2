#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "contract/error.h"
#include "tokenizer/unicode.h"

namespace tgate {
namespace {

/// Where the character before byte `at` begins.
std::size_t before(std::string_view text, std::size_t at) {
  do --at;
  while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80);
  return at;
}

bool word_ends(std::string_view text, std::size_t at) {
  if (!at) return false;
  std::size_t begin = before(text, at);
  return unicode::is_word(unicode::next(text, begin));
}

bool word_begins(std::string_view text, std::size_t at) {
  return at < text.size() && unicode::is_word(unicode::next(text, at));
}

std::size_t spaces_before(std::string_view text, std::size_t at) {
  while (at) {
    const std::size_t begin = before(text, at);
    std::size_t next = begin;
    if (!unicode::is_space(unicode::next(text, next))) break;
    at = begin;
  }
  return at;
}

std::size_t spaces_behind(std::string_view text, std::size_t at) {
  while (at < text.size()) {
    std::size_t next = at;
    if (!unicode::is_space(unicode::next(text, next))) break;
    at = next;
  }
  return at;
}

std::string normal(const std::string& content, const std::vector<Normalizer>& normalizers) {
  Aligned text = aligned(content);
  normalize(normalizers, text);
  return std::move(text.text);
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Model& model,
                         const std::vector<Normalizer>& normalizers) {
  std::unordered_map<std::string, std::uint32_t> ids;
  auto next = static_cast<std::uint32_t>(model.size());
  for (AddedToken& token : tokens) {
    auto found = ids.find(token.content);
    if (found == ids.end()) {
      const auto known = model.find(token.content);
      found = ids.emplace(token.content, known ? *known : next++).first;
    }
    const auto& [content, id] = *found;
    const auto taken = tokens_.find(id);
    if (taken != tokens_.end() && taken->second.content != content) {
      throw Error(Code::bundle, "the added tokens " + shown(taken->second.content) + " and " + shown(content) +
                                    " have one id, " + std::to_string(id));
    }
    tokens_[id] = std::move(token);
  }
  std::unordered_map<std::string, std::uint32_t> found;  // of normalized texts
  for (const auto& [id, token] : tokens_) {
    if (!token.normalized) {
      plain_.add(token.content, id);
      continue;
    }
    const std::string text = normal(token.content, normalizers);
    if (text.empty()) throw Error(Code::bundle, "its normalizer leaves nothing of the token " + shown(token.content));
    if (const auto [other, first] = found.emplace(text, id); !first) {
      throw Error(Code::bundle, "its normalizer makes the added tokens " + shown(tokens_.at(other->second).content) +
                                    " and " + shown(token.content) + " one, of which the library takes either");
    }
    normalized_.add(text, id);
  }
}

bool AddedTokens::has(std::uint32_t id) const { return tokens_.count(id) != 0; }

/// The longest token at the first place where there is one; then on behind it.
void AddedTokens::cut(const Trie& sought, Aligned text, std::vector<Piece>& pieces) const {
  const std::string_view whole = text.text;
  std::size_t done = 0;  // what lies before it is in pieces
  const auto add = [&](std::size_t begin, std::size_t end, std::optional<std::uint32_t> id) {
    if (begin < end) pieces.push_back({text.slice(begin, end), id});
  };
  for (std::size_t at = 0; at < whole.size();) {
    std::size_t length = 0;
    std::uint32_t id = 0;
    sought.prefixes(whole.substr(at), [&](std::size_t each, std::uint32_t value) {
      length = each;
      id = value;
    });
    if (!length) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + length;
    at = end;
    const AddedToken& token = tokens_.at(id);
    if (token.single_word && (word_ends(whole, begin) || word_begins(whole, end))) continue;
    if (token.lstrip) begin = std::max(spaces_before(whole, begin), done);
    if (token.rstrip) end = spaces_behind(whole, end);
    add(done, begin, std::nullopt);
    add(begin, end, id);
    done = end;
  }
  if (!done) {
    if (!whole.empty()) pieces.push_back({std::move(text)});
    return;
  }
  add(done, whole.size(), std::nullopt);
}

std::vector<Piece> AddedTokens::find(std::string_view prompt, const std::vector<Normalizer>& normalizers) const {
  std::vector<Piece> parts, pieces;
  cut(plain_, aligned(prompt), parts);
  for (Piece& part : parts) {
    if (part.id) {
      pieces.push_back(std::move(part));
    } else {
      normalize(normalizers, part.text);
      cut(normalized_, std::move(part.text), pieces);
    }
  }
  return pieces;
}

}  // namespace tgate
