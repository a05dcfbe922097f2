// Reads a manifest, signed again as whoever writes one would sign it, and what is made of one that is taken: its plans
// are checked on every shape, and what they need is counted.

#include <algorithm>
#include <string>

#include "contract/json.h"
#include "contract/manifest.h"
#include "contract/sha256.h"
#include "target.h"

namespace {

/// `text` with the digest that it has to have; as it is where it is no object.
std::string with_digest(std::string_view text) {
  using tgate::json::Object;
  try {
    tgate::json::Value value = tgate::json::parse(text);
    auto* const object = std::get_if<Object>(&value.held);
    if (object == nullptr) return std::string(text);
    const auto is_digest = [](const auto& member) { return member.first == "digest"; };
    object->erase(std::remove_if(object->begin(), object->end(), is_digest), object->end());
    std::string digest = tgate::sha256_of(tgate::json::canonical(value));
    object->emplace_back("digest", tgate::json::Value{std::move(digest)});
    return tgate::json::canonical(value);
  } catch (const tgate::json::ParseError&) {
    return std::string(text);
  }
}

void use(const tgate::Manifest& manifest) {
  for (const tgate::Shape& shape : manifest.shapes) {
    for (const auto& [name, plan] : manifest.plans) {
      // What plans need is only asked of plans that were checked.
      if (!fuzz::passes([&, &checked = plan] { checked.check(shape.graphs, manifest.carries); })) continue;
      const tgate::Memory memory = tgate::memory_of(manifest, shape, plan, shape.batch.least);
      fuzz::promise(memory.request >= 0 && memory.peak >= memory.request);
    }
    std::vector<std::pair<std::string, const tgate::GraphSpec*>> kept;
    for (const auto& [name, graph] : shape.graphs) kept.emplace_back(name, &graph);
    fuzz::passes([&] { tgate::check_signatures(manifest, kept); });
    fuzz::passes([&] { tgate::check_forms(shape, kept); });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  const std::string text = with_digest(fuzz::text_of(bytes, size));
  fuzz::passes([&] { use(tgate::Manifest::parse(text)); });
  return 0;
}
