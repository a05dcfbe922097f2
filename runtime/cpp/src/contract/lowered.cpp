#include "contract/lowered.h"

#include <algorithm>
#include <cstring>

#include "contract/error.h"
#include "contract/json.h"
#include "contract/numbers.h"
#include "contract/reader.h"
#include "contract/sha256.h"

namespace tgate {
namespace {

// As tgate_runtime.engines.ort_cuda.ahead writes it.
constexpr std::int64_t version = 2;
constexpr char folder[] = "engines/ort-cuda/";
constexpr char index_file[] = "engines/ort-cuda/lowered.json";
constexpr std::size_t most_index_bytes = std::size_t{32} << 20;
constexpr std::size_t most_graphs = 10'000, most_variants = 64, most_weights = 100'000;
constexpr std::int64_t most_dimensions = 8;
constexpr std::int64_t beyond = std::int64_t{1} << 50;  // tgate_runtime.engines.ort_cuda.lowering.laid has the same

constexpr char advice[] = "run tgate build again";
constexpr Spelling<Dtype> spellings[] = {
    {"float32", Dtype::float32}, {"float16", Dtype::float16}, {"bfloat16", Dtype::bfloat16},
    {"int64", Dtype::int64},     {"uint8", Dtype::uint8},
};

[[noreturn]] void refuse(const Bundle& bundle, const std::string& what) {
  const std::string path = shown(bundle.path(), 1000);
  throw Error(Code::bundle, path + ": " + what + "; run tgate build " + path + " --engine ort-cuda again, or remove " +
                                folder + " from it");
}

std::string content_of(const Bundle& bundle, const std::string& name, std::size_t most_bytes) {
  try {
    return PlainFile::open_inside(bundle.path(), name).read(most_bytes);
  } catch (const NotThere&) {
    throw;
  } catch (const FileError& error) {
    refuse(bundle, name + " cannot be read as a plain file (" + error.what() + ")");
  }
}

/// A digest in the index, 64 hexadecimal digits: it becomes a file's name.
std::string digest(Reader& entry, std::string_view key) {
  std::string text = entry.text(key);
  if (text.size() != 64 || text.find_first_not_of("0123456789abcdef") != std::string::npos) {
    entry.fail("." + std::string(key), "expected a SHA-256 in hexadecimal digits, got '" + shown(text, 60) + "'");
  }
  return text;
}

Laid laid_of(Reader& entry) {
  Laid laid{entry.word("source"), entry.wholes("order", most_dimensions - 1, 0), entry.choice("dtype", spellings)};
  return laid;
}

/// A tensor's numbers with its dimensions in another order; those of the last one lie next to each other in the end.
template <class T>
void permute(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& order, const std::byte* from,
             std::byte* to) {
  const std::size_t rank = order.size();
  std::vector<std::size_t> strides(rank, 1), sizes(rank), steps(rank), at(rank, 0);  // in numbers
  for (std::size_t i = rank - 1; i > 0; --i) strides[i - 1] = strides[i] * static_cast<std::size_t>(shape[i]);
  std::size_t rows = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    sizes[i] = static_cast<std::size_t>(shape[static_cast<std::size_t>(order[i])]);
    steps[i] = strides[static_cast<std::size_t>(order[i])];
    rows *= i + 1 < rank ? sizes[i] : 1;
  }
  const std::size_t width = sizes[rank - 1], step = steps[rank - 1];
  std::size_t first = 0;
  for (std::size_t row = 0; row < (width == 0 ? 0 : rows); ++row) {
    for (std::size_t i = 0; i < width; ++i, to += sizeof(T)) {
      std::memcpy(to, from + (first + i * step) * sizeof(T), sizeof(T));
    }
    for (std::size_t i = rank - 1; i-- > 0;) {
      first += steps[i];
      if (++at[i] < sizes[i]) break;
      first -= steps[i] * sizes[i];
      at[i] = 0;
    }
  }
}

/// What a lowered graph calls a weight that is laid so: the index says twice how, and the graph, whose digest is known,
/// once more.
std::string name_of(const Laid& laid) {
  std::string name = laid.source + ":";
  for (const std::int64_t dimension : laid.order) name += std::to_string(dimension);
  return laid.order.empty() ? name + "float32" : name;
}

}  // namespace

Placed place_of(const Laid& laid, const Places& places) {
  const auto found = places.find(laid.source);
  if (found == places.end()) {
    throw Error(Code::bundle, "a lowered graph lays weight '" + shown(laid.source, 60) +
                                  "', which the weight file does not hold; " + advice);
  }
  const Placed& source = found->second;
  std::vector<std::int64_t> sorted = laid.order;
  std::sort(sorted.begin(), sorted.end());
  bool fits = laid.order.empty() || sorted.size() == source.shape.size();
  for (std::size_t i = 0; i < sorted.size(); ++i) fits = fits && sorted[i] == static_cast<std::int64_t>(i);
  const bool floats = source.dtype != Dtype::int64 && source.dtype != Dtype::uint8;
  const bool turns = laid.dtype == source.dtype || (floats && laid.order.empty() && laid.dtype == Dtype::float32);
  if (!fits || !turns) {
    throw Error(Code::bundle, "a lowered graph lays weight '" + shown(laid.source, 60) + "' as it cannot be laid; " + advice);
  }
  Placed placed{laid.dtype, source.shape, beyond, source.length};
  for (std::size_t i = 0; i < laid.order.size(); ++i) {
    placed.shape[i] = source.shape[static_cast<std::size_t>(laid.order[i])];
  }
  placed.length = source.length / static_cast<std::int64_t>(facts_of(source.dtype).bytes) *
                  static_cast<std::int64_t>(facts_of(laid.dtype).bytes);
  return placed;
}

void lay(const Laid& laid, const Placed& source, const std::byte* from, std::byte* to) {
  const std::size_t bytes = facts_of(source.dtype).bytes;
  const auto length = static_cast<std::size_t>(source.length);
  if (laid.dtype != source.dtype) {
    decode(from, length / bytes, source.dtype, reinterpret_cast<float*>(to));
  } else if (laid.order.empty()) {
    std::memcpy(to, from, length);
  } else if (bytes == 1) {
    permute<std::uint8_t>(source.shape, laid.order, from, to);
  } else if (bytes == 2) {
    permute<std::uint16_t>(source.shape, laid.order, from, to);
  } else if (bytes == 4) {
    permute<std::uint32_t>(source.shape, laid.order, from, to);
  } else {
    permute<std::uint64_t>(source.shape, laid.order, from, to);
  }
}

std::optional<LoweredGraphs> LoweredGraphs::open(const Bundle& bundle) {
  json::Value index;
  try {
    index = json::parse(content_of(bundle, index_file, most_index_bytes));
  } catch (const NotThere&) {
    return std::nullopt;
  } catch (const json::ParseError& error) {
    refuse(bundle, std::string(index_file) + " is no JSON (" + error.what() + ")");
  }
  Reader reader(index, shown(bundle.path(), 200) + "/" + index_file, Code::bundle, advice);
  if (const std::int64_t got = reader.whole("version"); got != version) {
    refuse(bundle, std::string(index_file) + " is of version " + std::to_string(got) + ", and this library takes " +
                       std::to_string(version));
  }
  LoweredGraphs graphs;
  Reader::all_of(reader, [&](Reader& whole) {
    static_cast<void>(whole.whole("version"));
    const auto variant = [](Reader& one) {
      Variant made{one.words("outputs"), digest(one, "sha256"), {}};
      for (auto& [name, laid] : one.table("weights", laid_of, most_weights)) made.weights.emplace(name, laid);
      return made;
    };
    const auto entry = [&](Reader& one) {
      return Entry{digest(one, "source"), one.items("lowered", variant, most_variants)};
    };
    for (auto& [file, made] : whole.table("graphs", entry, most_graphs)) graphs.entries_.emplace(file, made);
    return 0;
  });
  return graphs;
}

std::vector<LoweredGraph> LoweredGraphs::find(const Bundle& bundle, const GraphSpec& spec, const Places& places) const {
  const auto found = entries_.find(spec.file);
  if (found == entries_.end()) return {};
  const Entry& entry = found->second;
  const auto listed = bundle.manifest().files.find(spec.file);
  if (listed == bundle.manifest().files.end() || listed->second.sha256 != entry.source) {
    refuse(bundle, spec.file + " was lowered from another graph than the manifest lists");
  }
  std::vector<LoweredGraph> graphs;
  for (const Variant& variant : entry.variants) graphs.push_back(read(bundle, spec, variant, places));
  if (graphs.empty() || graphs.front().spec.outputs.size() != spec.outputs.size()) {
    refuse(bundle, spec.file + " was not lowered with all of its outputs first");
  }
  return graphs;
}

LoweredGraph LoweredGraphs::read(const Bundle& bundle, const GraphSpec& spec, const Variant& variant, const Places& places) {
  LoweredGraph graph{spec, {}, variant.weights};
  graph.spec.outputs.clear();
  for (const TensorSpec& tensor : spec.outputs) {
    const bool wanted = std::count(variant.outputs.begin(), variant.outputs.end(), tensor.name) > 0;
    if (wanted) graph.spec.outputs.push_back(tensor);
  }
  if (graph.spec.outputs.empty() || graph.spec.outputs.size() != variant.outputs.size()) {
    refuse(bundle, spec.file + " was lowered for outputs that it does not have");
  }
  const std::string name = folder + variant.digest + ".onnx";
  try {
    graph.data = content_of(bundle, name, most_graph_bytes);
  } catch (const NotThere&) {
    refuse(bundle, spec.file + " was lowered, and " + name + " is missing");
  }
  if (sha256_of(graph.data) != variant.digest) {
    refuse(bundle, name + " is damaged: its SHA-256 is not its name");
  }
  Places all = places;
  for (const auto& [own, laid] : graph.weights) {
    if (own != name_of(laid)) {
      refuse(bundle, spec.file + ", lowered, lays '" + shown(name_of(laid), 60) + "' as '" + shown(own, 60) + "'");
    }
    if (!all.emplace(own, place_of(laid, places)).second) {
      refuse(bundle, spec.file + ", lowered, lays a weight as '" + shown(own, 60) + "', which the weight file has too");
    }
  }
  check_graph(graph.data, graph.spec, bundle.manifest().weights, all, true);
  return graph;
}

}  // namespace tgate
