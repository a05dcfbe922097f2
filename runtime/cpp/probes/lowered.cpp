// What libtgate takes of the lowered graphs in a bundle's folder: lowered BUNDLE prints JSON, null where there is none, or
// for each graph's file a list: of each way in which it was lowered {"outputs": [names], "sha256": of its bytes, "weights":
// {name: sha256 of the bytes that would be uploaded}}. What is refused it says on standard error, and ends with 1.

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "contract/json.h"
#include "contract/lowered.h"
#include "contract/sha256.h"

namespace {

using tgate::json::Object;
using tgate::json::Value;

Value told(const tgate::LoweredGraph& graph, const std::string& file, const tgate::Places& places) {
  Object weights;
  for (const auto& [name, laid] : graph.weights) {
    const tgate::Placed& source = places.at(laid.source);
    std::string bytes(static_cast<std::size_t>(tgate::place_of(laid, places).length), '\0');
    tgate::lay(laid, source, reinterpret_cast<const std::byte*>(file.data()) + source.offset,
               reinterpret_cast<std::byte*>(bytes.data()));
    weights.emplace_back(name, Value{tgate::sha256_of(bytes)});
  }
  tgate::json::Array outputs;
  for (const tgate::TensorSpec& tensor : graph.spec.outputs) outputs.push_back(Value{tensor.name});
  return {Object{{"outputs", Value{std::move(outputs)}}, {"sha256", Value{tgate::sha256_of(graph.data)}}, {"weights", Value{std::move(weights)}}}};
}

}  // namespace

int main(int count, char** words) try {
  if (count != 2) {
    std::fputs("usage: lowered BUNDLE\n", stderr);
    return 2;
  }
  const tgate::Bundle bundle = tgate::Bundle::open(words[1], true);
  const tgate::Places places = bundle.places();
  std::ifstream stream(bundle.path() + "/" + bundle.manifest().weights, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  Value result;
  if (const auto graphs = tgate::LoweredGraphs::open(bundle)) {
    Object found;
    for (const auto& [name, spec] : bundle.manifest().shapes.front().graphs) {
      tgate::json::Array variants;
      for (const auto& graph : graphs->find(bundle, spec, places)) variants.push_back(told(graph, file, places));
      found.emplace_back(spec.file, Value{std::move(variants)});
    }
    result = {std::move(found)};
  }
  std::printf("%s\n", tgate::json::canonical(result).c_str());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
