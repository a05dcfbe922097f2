#include "tokenizer/read.h"

#include <string>
#include <string_view>

#include "contract/error.h"

namespace tgate {
namespace {

using checks::Place;

/// How CLIP's tokenizer cuts a text into words, as transformers writes it and wrote it.
constexpr std::string_view clip_words_special =
    R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";
constexpr std::string_view clip_words = R"('s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

PreTokenizer read_metaspace(const json::Value& value, const Place& place) {
  const auto [_, replacement, prepend, split] =
      checks::fields<4>(value, place, {"type", "replacement", "prepend_scheme", "split"});
  checks::one_of(*replacement, Place(place, "replacement"), {"▁"});
  const std::string& scheme = checks::one_of(*prepend, Place(place, "prepend_scheme"), {"always", "first", "never"});
  using Prepend = Metaspace::Prepend;
  return Metaspace{scheme == "always" ? Prepend::always : scheme == "first" ? Prepend::first : Prepend::never,
                   checks::flag(*split, Place(place, "split"))};
}

PreTokenizer read_split(const json::Value& value, const Place& place) {
  const auto [_, pattern, behavior, invert] =
      checks::fields<4>(value, place, {"type", "pattern", "behavior", "invert"});
  const Place here(place, "pattern");
  const auto [regex] = checks::fields<1>(*pattern, here, {"Regex"});
  const std::string& words = checks::one_of(*regex, Place(here, "Regex"), {clip_words_special, clip_words});
  checks::one_of(*behavior, Place(place, "behavior"), {"Removed"});
  if (!checks::flag(*invert, Place(place, "invert"))) checks::refuse(Place(place, "invert"), *invert, "true");
  return ClipWords{words == clip_words_special};
}

PreTokenizer read_byte_level(const json::Value& value, const Place& place) {
  const auto [_, prefix, trim, regex] =
      checks::fields<4>(value, place, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
  checks::flag(*trim, Place(place, "trim_offsets"));  // acts where ByteLevel comes behind a model
  return ByteLevel{checks::flag(*prefix, Place(place, "add_prefix_space")),
                   checks::flag(*regex, Place(place, "use_regex"))};
}

PreTokenizer read_pre_tokenizer(const json::Value& value, const Place& place) {
  const std::string& kind =
      checks::kind(value, place, {"Whitespace", "WhitespaceSplit", "Metaspace", "Split", "ByteLevel"});
  if (kind == "Metaspace") return read_metaspace(value, place);
  if (kind == "Split") return read_split(value, place);
  if (kind == "ByteLevel") return read_byte_level(value, place);
  checks::fields<1>(value, place, {"type"});
  if (kind == "Whitespace") return Whitespace{};
  return WhitespaceSplit{};
}

/// A token's name and its id, of which the id counts.
std::uint32_t read_named(const json::Value& value, const Place& place) {
  const auto* pair = value.as<json::Array>();
  if (!pair || pair->size() != 2) checks::refuse(place, value, "a token with its id");
  checks::text((*pair)[0], place);
  return checks::id((*pair)[1], place);
}

Frame read_roberta(const json::Value& value, const Place& place) {
  const auto [_, sep, cls, trim, prefix] =
      checks::fields<5>(value, place, {"type", "sep", "cls", "trim_offsets", "add_prefix_space"});
  return {{read_named(*cls, Place(place, "cls"))},
          {read_named(*sep, Place(place, "sep"))},
          true,
          checks::flag(*trim, Place(place, "trim_offsets")),
          checks::flag(*prefix, Place(place, "add_prefix_space"))};
}

void check_type_id(const json::Value& value, const Place& place) {
  const auto* found = value.as<std::int64_t>();
  if (!found || (*found != 0 && *found != 1)) checks::refuse(place, value, "0 or 1");
}

/// The ids of a special token, which is one token under its own name.
std::vector<std::uint32_t> read_special(const std::string& name, const json::Value& value, const Place& place) {
  checks::text({name}, place);
  const auto [id, ids, tokens] = checks::fields<3>(value, place, {"id", "ids", "tokens"});
  std::vector<std::uint32_t> found;
  std::size_t i = 0;
  const Place of_ids(place, "ids"), of_tokens(place, "tokens");
  for (const json::Value& each : checks::list(*ids, of_ids, checks::most_special)) {
    found.push_back(checks::id(each, Place(of_ids, i++)));
  }
  i = 0;
  for (const json::Value& each : checks::list(*tokens, of_tokens, checks::most_special)) {
    checks::text(each, Place(of_tokens, i++));
  }
  if (checks::text(*id, Place(place, "id")) != name || found.empty() || found.size() != i) {
    checks::refuse(place, " is not one token with as many ids as names");
  }
  return found;
}

/// Special tokens around a text, which stands there once at most.
Frame read_template(const json::Value& value, const Place& place) {
  const auto [_, single, pair, special] = checks::fields<4>(value, place, {"type", "single", "pair", "special_tokens"});
  const Place of_special(place, "special_tokens"), of_single(place, "single");
  const json::Object& tokens = checks::object(*special, of_special);
  if (tokens.size() > checks::most_special) {
    checks::refuse(of_special, *special, "an object of at most " + std::to_string(checks::most_special));
  }
  std::vector<std::pair<std::string_view, std::vector<std::uint32_t>>> known;
  for (const auto& [name, each] : tokens) known.emplace_back(name, read_special(name, each, Place(of_special, name)));
  Frame frame;
  frame.text = false;
  std::size_t i = 0;
  for (const json::Value& each : checks::list(*single, of_single, checks::most_special)) {
    const Place at(of_single, i++);
    const auto& [kind, piece] = checks::one_field(each, at, {"Sequence", "SpecialToken"});
    const Place here(at, kind);
    const auto [id, type_id] = checks::fields<2>(piece, here, {"id", "type_id"});
    check_type_id(*type_id, Place(here, "type_id"));
    if (kind == "Sequence") {
      checks::one_of(*id, Place(here, "id"), {"A"});
      if (frame.text) checks::refuse(of_single, " holds the text more than once");
      frame.text = true;
      continue;
    }
    const std::string& name = checks::text(*id, Place(here, "id"));
    std::size_t which = 0;
    while (which < known.size() && known[which].first != name) ++which;
    if (which == known.size()) {
      checks::refuse(of_single, " names " + shown(name) + ", which is not in special_tokens");
    }
    auto& side = frame.text ? frame.behind : frame.before;
    side.insert(side.end(), known[which].second.begin(), known[which].second.end());
  }
  return frame;
}

}  // namespace

std::vector<PreTokenizer> read_pre_tokenizers(const json::Value& value, const Place& place) {
  std::vector<PreTokenizer> pre_tokenizers;
  if (value.as<std::nullptr_t>()) return pre_tokenizers;
  each_component(
      value, place, "pretokenizers", checks::most_special,
      [&](const json::Value& each, const Place& at) { pre_tokenizers.push_back(read_pre_tokenizer(each, at)); });
  return pre_tokenizers;
}

Frame read_frame(const json::Value& value, const Place& place) {
  if (value.as<std::nullptr_t>()) return {};
  const std::string& kind = checks::kind(value, place, {"RobertaProcessing", "TemplateProcessing"});
  return kind == "RobertaProcessing" ? read_roberta(value, place) : read_template(value, place);
}

}  // namespace tgate
