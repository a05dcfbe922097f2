#include "contract/onnx_operators.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>

namespace tgate::onnx {
namespace {

#include "contract/onnx_operators.inc"

bool is_one_of(std::string_view words, std::string_view text) {
  while (!words.empty()) {
    const std::size_t end = std::min(words.find(' '), words.size());
    if (words.substr(0, end) == text) return true;
    words.remove_prefix(std::min(end + 1, words.size()));
  }
  return false;
}

bool fits(const Rule& rule, std::int64_t number) {
  if (number < rule.least || number > rule.most) return false;
  return rule.numbers == 0 || (rule.numbers >> number & 1) != 0;
}

bool fits(const Rule& rule, const Value& value) {
  switch (rule.type) {
    case 1: return std::isfinite(value.number);
    case 2: return fits(rule, value.whole);
    case 3:
      if (rule.letters.empty()) return is_one_of(rule.words, value.text);
      return fits(rule, static_cast<std::int64_t>(value.text.size())) &&
             value.text.find_first_not_of(rule.letters) == std::string_view::npos;
    case 7:
      return value.several.size() <= most_numbers &&
             std::all_of(value.several.begin(), value.several.end(), [&](std::int64_t one) { return fits(rule, one); });
    default: return false;
  }
}

}  // namespace

const Operator* find_operator(std::string_view domain, std::string_view name, bool lowered) noexcept {
  const auto before = [](const Operator& one, std::string_view wanted) { return one.name < wanted; };
  const auto* const found = std::lower_bound(std::begin(operators), std::end(operators), name, before);
  if (found == std::end(operators) || found->name != name || (found->lowered && !lowered)) return nullptr;
  return domain == (found->lowered ? contrib : std::string_view()) ? found : nullptr;
}

bool is_contrib(std::string_view domain, std::int64_t version) noexcept { return domain == contrib && version == 1; }

bool takes(const Operator& known, const std::vector<std::string_view>& inputs,
           const std::vector<std::string_view>& outputs) noexcept {
  std::string_view places = known.inputs;
  const bool more = places.back() == '*';
  if (more) places.remove_suffix(1);
  if (inputs.size() > (more ? std::max(places.size(), most_tensors) : places.size())) return false;
  for (std::size_t i = 0; i < std::max(places.size(), inputs.size()); ++i) {
    const bool wanted = i >= places.size() || places[i] == '1';
    if (wanted && (i >= inputs.size() || inputs[i].empty())) return false;
  }
  return !outputs.empty() && outputs.size() <= known.most_outputs && !outputs.front().empty();
}

bool may_say(const Operator& known, std::string_view name, const Value& value) noexcept {
  for (const Rule* const* rule = known.attributes; *rule != nullptr; ++rule) {
    if ((*rule)->name == name) return (*rule)->type == value.type && fits(**rule, value);
  }
  return false;
}

}  // namespace tgate::onnx
