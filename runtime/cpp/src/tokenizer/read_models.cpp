#include <array>
#include <cmath>
#include <cstdlib>
#include <string>

#include "contract/error.h"
#include "tokenizer/read.h"

namespace tgate {
namespace {

using checks::Place;

constexpr double most_score = 1e6;

Vocabulary read_vocabulary(const json::Value& value, const Place& place) {
  const json::Object& object = checks::object(value, place);
  if (object.empty() || object.size() > checks::most_tokens) {
    checks::refuse(place, value, "an object of 1 to " + std::to_string(checks::most_tokens) + " tokens");
  }
  std::vector<std::pair<std::string, std::uint32_t>> tokens;
  tokens.reserve(object.size());
  for (const auto& [token, id] : object) {
    if (token.empty() || token.size() > checks::most_characters) checks::text({token}, Place(place, token));
    tokens.emplace_back(token, checks::id(id, Place(place, token)));
  }
  return Vocabulary(std::move(tokens));
}

/// The token that stands for whatever has none has to be one.
void check_unknown(const Vocabulary& vocabulary, const std::string& unknown, const Place& place) {
  if (!vocabulary.find(unknown)) checks::refuse(place, " " + shown(unknown) + " is not in the vocabulary");
}

std::unique_ptr<const Model> read_table(const json::Value& value, const Place& place) {
  const auto [_, vocab, unk_token] = checks::fields<3>(value, place, {"type", "vocab", "unk_token"});
  Vocabulary vocabulary = read_vocabulary(*vocab, Place(place, "vocab"));
  const Place here(place, "unk_token");
  const std::string& unknown = checks::text(*unk_token, here);
  check_unknown(vocabulary, unknown, here);
  return make_table(std::move(vocabulary), unknown);
}

std::unique_ptr<const Model> read_bpe(const json::Value& value, const Place& place) {
  const auto [_, dropout, unk_token, prefix, suffix, fuse, fallback, ignore, vocab, pairs] = checks::fields<10>(
      value, place,
      {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
       "ignore_merges", "vocab", "merges"});
  checks::nothing(*dropout, Place(place, "dropout"));
  checks::no(*fallback, Place(place, "byte_fallback"));
  if (!prefix->as<std::nullptr_t>()) checks::one_of(*prefix, Place(place, "continuing_subword_prefix"), {""});
  std::string end;
  if (!suffix->as<std::nullptr_t>()) end = checks::one_of(*suffix, Place(place, "end_of_word_suffix"), {"</w>", ""});
  BpeSettings settings{read_vocabulary(*vocab, Place(place, "vocab")),
                       {},
                       std::nullopt,
                       std::move(end),
                       checks::flag(*fuse, Place(place, "fuse_unk")),
                       checks::flag(*ignore, Place(place, "ignore_merges"))};
  const Place here(place, "merges");
  const json::Array& list = checks::list(*pairs, here, checks::most_tokens);
  const auto known = [&](const std::string& token) {
    const std::uint32_t* found = settings.vocabulary.find(token);
    if (!found) checks::refuse(here, " name " + shown(token) + ", which is not in the vocabulary");
    return *found;
  };
  settings.merges.reserve(list.size());
  std::size_t i = 0;
  for (const json::Value& each : list) {
    const Place at(here, i++);
    const auto* pair = each.as<json::Array>();
    if (!pair || pair->size() != 2) checks::refuse(at, each, "a pair of tokens");
    const std::string &first = checks::text((*pair)[0], at), &second = checks::text((*pair)[1], at);
    settings.merges.push_back({known(first), known(second), known(first + second)});
  }
  if (!unk_token->as<std::nullptr_t>()) {
    settings.unknown = checks::text(*unk_token, Place(place, "unk_token"));
    check_unknown(settings.vocabulary, *settings.unknown, Place(place, "unk_token"));
  }
  return make_bpe(std::move(settings));
}

/// A score as the library comes to read it: Python writes it with the fewest digits that say it, and the library makes
/// a number of them with two roundings, so that the last bit may be another one.
double as_the_library_reads(double score) {
  const std::string text = json::repr(std::fabs(score));
  double digits = 0;
  std::uint64_t whole = 0;
  int exponent = 0;
  bool fraction = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == 'e') {
      exponent += std::atoi(text.c_str() + i + 1);
      break;
    }
    if (text[i] == '.') {
      fraction = true;
      continue;
    }
    whole = 10 * whole + static_cast<std::uint64_t>(text[i] - '0');
    exponent -= fraction ? 1 : 0;
  }
  digits = static_cast<double>(whole);
  static const std::array<double, 309> powers = [] {
    std::array<double, 309> made{};
    for (std::size_t i = 0; i < made.size(); ++i) made[i] = std::strtod(("1e" + std::to_string(i)).c_str(), nullptr);
    return made;
  }();
  if (exponent < -308) {
    digits /= powers[308];
    exponent += 308;
  }
  const double power = powers[static_cast<std::size_t>(std::abs(exponent))];
  digits = exponent < 0 ? digits / power : digits * power;
  return std::signbit(score) ? -digits : digits;
}

std::unique_ptr<const Model> read_unigram(const json::Value& value, const Place& place) {
  const auto [_, unk_id, vocab, fallback] =
      checks::fields<4>(value, place, {"type", "unk_id", "vocab", "byte_fallback"});
  checks::no(*fallback, Place(place, "byte_fallback"));
  const Place here(place, "vocab");
  const json::Array& list = checks::list(*vocab, here, checks::most_tokens);
  std::vector<std::pair<std::string, double>> scores;
  scores.reserve(list.size());
  std::size_t i = 0;
  for (const json::Value& each : list) {
    const Place at(here, i++);
    const auto* pair = each.as<json::Array>();
    if (!pair || pair->size() != 2) checks::refuse(at, each, "a token with its score");
    const auto* whole = (*pair)[1].as<std::int64_t>();
    const auto* number = (*pair)[1].as<double>();
    const double score = whole ? static_cast<double>(*whole) : number ? *number : most_score + 1;
    if (std::fabs(score) > most_score) checks::refuse(at, (*pair)[1], "a score up to 1000000");
    scores.emplace_back(checks::text((*pair)[0], at), as_the_library_reads(score));
  }
  const std::uint32_t unknown = checks::id(*unk_id, Place(place, "unk_id"));
  if (unknown >= scores.size()) {
    checks::refuse(Place(place, "unk_id"), " is " + std::to_string(unknown) + ", the vocabulary has " +
                                               std::to_string(scores.size()) + " tokens");
  }
  return make_unigram(std::move(scores), unknown);
}

}  // namespace

std::unique_ptr<const Model> read_model(const json::Value& value, const Place& place) {
  const std::string& kind = checks::kind(value, place, {"BPE", "Unigram", "WordLevel"});
  if (kind == "BPE") return read_bpe(value, place);
  return kind == "Unigram" ? read_unigram(value, place) : read_table(value, place);
}

}  // namespace tgate
