#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <utility>

#include "contract/error.h"
#include "contract/json.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/read.h"
#include "tokenizer/unicode.h"

namespace tgate {
namespace {

using checks::Place;

constexpr std::size_t most_bytes = std::size_t{1} << 24;       // of a file
constexpr std::size_t most_characters = std::size_t{1} << 15;  // of a prompt

AddedToken read_added(const json::Value& value, const Place& place, std::vector<std::uint32_t>& ids) {
  const auto [id, content, single_word, lstrip, rstrip, normalized, special] = checks::fields<7>(
      value, place, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  ids.push_back(checks::id(*id, Place(place, "id")));
  const std::string& text = checks::text(*content, Place(place, "content"));
  bool seen = false;
  for (std::size_t at = 0; at < text.size();) seen = !unicode::is_python_space(unicode::next(text, at)) || seen;
  if (!seen) checks::refuse(Place(place, "content"), *content, "more than spaces");
  checks::flag(*special, Place(place, "special"));  // acts where tokens are made into text
  return {text, checks::flag(*single_word, Place(place, "single_word")), checks::flag(*lstrip, Place(place, "lstrip")),
          checks::flag(*rstrip, Place(place, "rstrip")), checks::flag(*normalized, Place(place, "normalized"))};
}

/// A token's place in a prompt, in bytes; its name says how many spaces are part of it.
struct Placed {
  std::uint32_t id;
  Span from;
  std::string_view name;
};

/// How many spaces a token begins with, or ends with; the character that stands for a space's byte is one.
std::size_t leading_spaces(std::string_view name) {
  std::size_t count = 0;
  for (std::size_t at = 0; at < name.size(); ++count) {
    const char32_t c = unicode::next(name, at);
    if (c != U'Ġ' && !unicode::is_space(c)) break;
  }
  return count;
}

std::size_t trailing_spaces(std::string_view name) {
  std::size_t count = 0;
  for (std::size_t at = 0; at < name.size();) {
    const char32_t c = unicode::next(name, at);
    count = c == U'Ġ' || unicode::is_space(c) ? count + 1 : 0;
  }
  return count;
}

/// The part of a prompt from the first of some tokens to the last one. `each`: how many tokens the library keeps
/// together when it cuts; the first of each is treated as the beginning of a text.
std::string part(std::string_view prompt, const std::vector<Placed>& tokens, std::size_t first, std::size_t each,
                 const Frame& frame) {
  std::vector<std::size_t> starts;                     // of characters, in bytes
  std::vector<std::size_t> places(prompt.size() + 1);  // of bytes, in characters
  for (std::size_t at = 0; at < prompt.size();) {
    std::size_t next = at;
    unicode::next(prompt, next);
    std::fill(places.begin() + static_cast<std::ptrdiff_t>(at), places.begin() + static_cast<std::ptrdiff_t>(next),
              starts.size());
    starts.push_back(at);
    at = next;
  }
  places.back() = starts.size();
  starts.push_back(prompt.size());
  std::size_t from = starts.size(), to = 0;
  for (std::size_t i = first; i < tokens.size(); ++i) {
    std::size_t begin = places[tokens[i].from.begin], end = places[tokens[i].from.end];
    if (frame.trim) {
      std::size_t leading = leading_spaces(tokens[i].name);
      const std::size_t trailing = trailing_spaces(tokens[i].name);
      if (leading == 1 && frame.add_prefix_space && (i % each == 0 || begin == 0)) leading = 0;
      begin = std::min(begin + leading, end);
      if (end >= trailing) end = std::max(end - trailing, begin);
    }
    from = std::min(from, begin);
    to = std::max(to, end);
  }
  return from < to ? std::string(prompt.substr(starts[from], starts[to] - starts[from])) : std::string();
}

}  // namespace

struct Tokenizer::Parts {
  std::size_t length;  // of what a prompt becomes
  std::int64_t pad_id;
  std::vector<Normalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  std::unique_ptr<const Model> model;
  AddedTokens added;
  Frame frame;

  [[nodiscard]] std::size_t around() const { return frame.before.size() + frame.behind.size(); }

  static std::unique_ptr<const Parts> read(std::string_view text, std::int64_t length, std::int64_t pad_id);
};

std::unique_ptr<const Tokenizer::Parts> Tokenizer::Parts::read(std::string_view text, std::int64_t length,
                                                               std::int64_t pad_id) {
  const auto refuse = [](const std::string& says) { throw Error(Code::bundle, says); };
  if (text.size() > most_bytes) {
    refuse("it holds " + std::to_string(text.size()) + " bytes, at most " + std::to_string(most_bytes) + " are read");
  }
  json::Value whole;
  try {
    whole = json::parse(text);
  } catch (const json::ParseError& error) {
    refuse("it is no JSON: " + shown(error.what()));
  }
  const Place top;
  // The last three are not used: what cuts and fills up is this class, and nothing is made into text.
  const auto [version, added_tokens, normalizer, pre_tokenizer, post_processor, model_value, truncation, padding,
              decoder] =
      checks::fields<9>(whole, top,
                        {"version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model",
                         "truncation", "padding", "decoder"});
  checks::one_of(*version, Place(top, "version"), {"1.0"});
  std::vector<AddedToken> tokens;
  std::vector<std::uint32_t> ids;
  const Place here(top, "added_tokens");
  for (const json::Value& each : checks::list(*added_tokens, here, checks::most_added)) {
    tokens.push_back(read_added(each, Place(here, tokens.size()), ids));
  }
  std::vector<Normalizer> normalizers = read_normalizers(*normalizer, Place(top, "normalizer"), tokens.size());
  std::vector<PreTokenizer> pre_tokenizers = read_pre_tokenizers(*pre_tokenizer, Place(top, "pre_tokenizer"));
  Frame frame = read_frame(*post_processor, Place(top, "post_processor"));
  std::unique_ptr<const Model> model = read_model(*model_value, Place(top, "model"));
  for (const auto* side : {&frame.before, &frame.behind}) {
    for (const std::uint32_t id : *side) {
      if (model->has(id) || std::find(ids.begin(), ids.end(), id) != ids.end()) continue;
      refuse("post_processor puts token " + std::to_string(id) + " around a text, which is none of its tokens");
    }
  }
  AddedTokens added(std::move(tokens), *model, normalizers);
  const std::size_t around = frame.before.size() + frame.behind.size();
  if (length < 0 || around >= static_cast<std::uint64_t>(length)) {
    refuse("it puts " + std::to_string(around) + " tokens around a prompt, and " + std::to_string(length) + " fit");
  }
  const auto pad = static_cast<std::uint32_t>(pad_id);
  if (pad_id != static_cast<std::int64_t>(pad) || !(model->has(pad) || added.has(pad))) {
    refuse("padding is token " + std::to_string(pad_id) + ", which it does not have");
  }
  return std::make_unique<Parts>(Parts{static_cast<std::size_t>(length), pad_id, std::move(normalizers),
                                       std::move(pre_tokenizers), std::move(model), std::move(added),
                                       std::move(frame)});
}

Tokenizer Tokenizer::parse(std::string_view text, std::int64_t length, std::int64_t pad_id, const std::string& name) {
  try {
    return Tokenizer(Parts::read(text, length, pad_id));
  } catch (const Error& error) {
    throw Error(error.code(), name + " is not a tokenizer (" + shown(error.what(), 300) + "); export the bundle again");
  }
}

Tokenizer::Tokenizer(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Encoding Tokenizer::encode(std::string_view prompt) const {
  if (const std::size_t count = unicode::count(prompt); count > most_characters) {
    throw Error(Code::request, "the prompt has " + std::to_string(count) + " characters, at most " +
                                   std::to_string(most_characters) +
                                   " are read, and a model takes a few hundred words of them; shorten it");
  }
  if (!is_utf8(prompt)) {
    throw Error(Code::request, "the prompt must be text in valid Unicode, got '" + shown(prompt) + "'");
  }
  std::vector<Piece> pieces = parts_->added.find(prompt, parts_->normalizers);
  pre_tokenize(parts_->pre_tokenizers, pieces);
  std::vector<Placed> placed;
  std::vector<Token> tokens;
  for (const Piece& piece : pieces) {
    tokens.clear();
    if (piece.id) {
      tokens.push_back({*piece.id, 0, piece.text.text.size(), piece.text.text});
    } else {
      parts_->model->tokenize(piece.text.text, tokens);
    }
    for (const Token& token : tokens) {
      const std::vector<Span>& from = piece.text.from;
      placed.push_back({token.id, {from[token.begin].begin, from[token.end - 1].end}, token.name});
    }
  }
  const Frame& frame = parts_->frame;
  const std::size_t most = parts_->length - parts_->around();
  Encoding encoding;
  encoding.ids.reserve(parts_->length);
  encoding.ids.assign(frame.before.begin(), frame.before.end());
  if (frame.text) {
    for (std::size_t i = 0; i < std::min(most, placed.size()); ++i) encoding.ids.push_back(placed[i].id);
    if (placed.size() > most) encoding.cut = part(prompt, placed, most, most, frame);
  }
  encoding.ids.insert(encoding.ids.end(), frame.behind.begin(), frame.behind.end());
  encoding.ids.resize(parts_->length, parts_->pad_id);
  return encoding;
}

}  // namespace tgate
