// The components of a tokenizer.json: those that tgate_engine/tokenizer_check.py knows, with its bounds, and no others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "contract/json.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/checks.h"
#include "tokenizer/models.h"
#include "tokenizer/normalizers.h"
#include "tokenizer/pre_tokenizers.h"

namespace tgate {

/// What is put around the tokens of a prompt, and which spaces are no part of a token's place in it.
struct Frame {
  std::vector<std::uint32_t> before, behind;
  bool text = true;               // whether the prompt itself is there
  bool trim = false;              // a token's place begins behind its spaces, and ends before them
  bool add_prefix_space = false;  // but for one space at the beginning
};

// Each throws Error of Code::bundle, which says where it found what.

/// `added`: how many added tokens there are, which all are normalized when the file is loaded.
std::vector<Normalizer> read_normalizers(const json::Value& value, const checks::Place& place, std::size_t added);
std::vector<PreTokenizer> read_pre_tokenizers(const json::Value& value, const checks::Place& place);
std::unique_ptr<const Model> read_model(const json::Value& value, const checks::Place& place);
Frame read_frame(const json::Value& value, const checks::Place& place);

/// Components, or a `Sequence` of them, which may hold another one, in a row: calls `one(value, place)` for each. The
/// member `items` of a `Sequence` holds at most `most`.
template <class One>
void each_component(const json::Value& value, const checks::Place& place, std::string_view items, std::size_t most,
                    const One& one, int depth = 0) {
  const json::Value* type = value.find("type");
  const auto* name = type ? type->as<std::string>() : nullptr;
  if (!name || *name != "Sequence") return one(value, place);
  if (depth > 2) checks::refuse(place, " is nested too deeply");
  const auto [_, list] = checks::fields<2>(value, place, {"type", items});
  const checks::Place here(place, items);
  std::size_t i = 0;
  for (const json::Value& item : checks::list(*list, here, most)) {
    each_component(item, checks::Place(here, i++), items, most, one, depth + 1);
  }
}

}  // namespace tgate
