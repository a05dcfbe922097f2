// A manifest, read distrustfully: every field is checked for its type and its bounds, every file name must be a plain
// name inside the bundle, and what is not known is refused.
#include <algorithm>

#include "contract/error.h"
#include "contract/manifest.h"
#include "contract/reader.h"
#include "contract/sha256.h"
#include "contract/text.h"

namespace tgate {
namespace {

constexpr char file[] = "manifest.json";
constexpr char again[] = "export the bundle again";
constexpr std::int64_t schema_version = 3;

constexpr std::size_t most_files = 10'000;
constexpr std::size_t most_shapes = 64;
constexpr std::size_t most_plans = 1000;
constexpr std::size_t most_adapters = 1000;
constexpr std::size_t most_tensors = 1024;    // of a graph, a way: SDXL's have 150
constexpr std::int64_t most_size = 1 << 16;   // pixels of a side, frames, images in a call
constexpr std::int64_t most_rows = 1 << 20;   // tokens of a prompt
constexpr std::size_t most_rank = 8;
constexpr std::int64_t most_tensor_bytes = std::int64_t{1} << 40;
constexpr int most_depth = 16;  // of the scheduler's configuration, which is nobody's but diffusers'

constexpr Spelling<Role> roles[] = {
    {"denoise", Role::denoise}, {"text", Role::text}, {"image", Role::image}, {"decode", Role::decode},
    {"encode", Role::encode}, {"preview", Role::preview}};
constexpr Spelling<Source> sources[] = {{"text", Source::text}, {"image", Source::image}, {"constant", Source::constant}};
constexpr Spelling<Negative> negatives[] = {{"own", Negative::own}, {"same", Negative::same}, {"zeros", Negative::zeros}};
constexpr Spelling<Guidance> guidances[] = {
    {"classifier-free", Guidance::classifier_free}, {"embedded", Guidance::embedded}, {"none", Guidance::none}};

Dtype read_dtype(Reader& r, std::string_view key) {
  static constexpr Spelling<Dtype> spellings[] = {
      {dtypes[0].name, dtypes[0].dtype}, {dtypes[1].name, dtypes[1].dtype}, {dtypes[2].name, dtypes[2].dtype},
      {dtypes[3].name, dtypes[3].dtype}, {dtypes[4].name, dtypes[4].dtype}};
  static_assert(std::size(dtypes) == std::size(spellings));
  return r.choice(key, spellings);
}

std::vector<std::int64_t> read_dims(Reader& r) {
  std::vector<std::int64_t> dims;
  for (const json::Value& value : r.list("shape", most_rank)) {
    const std::int64_t* size = value.as<std::int64_t>();
    const std::string* word = value.as<std::string>();
    if (size && *size >= 1) {
      dims.push_back(*size);
    } else if (word && *word == "batch" && dims.empty()) {
      dims.push_back(-1);
    } else {
      r.fail(".shape", quoted(value) + " is neither a size nor, in the first place, 'batch'");
    }
  }
  return dims;
}

Range read_range(Reader& r) {
  const std::vector<std::int64_t> batch = r.wholes("batch", most_size);
  if (batch.size() != 2 || batch[0] > batch[1]) {
    r.fail(".batch", "expected [least, most], got " + quoted(r.get("batch")));
  }
  return {batch[0], batch[1]};
}

/// Inputs or outputs, of which no two have one name, and none is beyond every memory.
std::vector<TensorSpec> read_tensors(Reader& r, std::string_view key, std::int64_t most_images) {
  const std::string place = "." + std::string(key);
  std::vector<TensorSpec> tensors = r.items(
      key,
      [](Reader& t) {
        TensorSpec tensor;
        tensor.name = t.word("name");
        tensor.dtype = read_dtype(t, "dtype");
        tensor.shape = read_dims(t);
        return tensor;
      },
      most_tensors);
  std::vector<std::string_view> names;
  for (const TensorSpec& tensor : tensors) {
    if (tensor.bytes(most_images) > most_tensor_bytes) {
      r.fail(place, shown(tensor.name, 60) + " holds more than " + std::to_string(most_tensor_bytes) + " bytes for " +
                        std::to_string(most_images) + " images");
    }
    names.push_back(tensor.name);
  }
  check_unique(std::move(names), r.where() + place);
  return tensors;
}

GraphSpec read_graph(Reader& r) {
  GraphSpec graph;
  graph.file = r.name("file");
  if (r.text("role") == "reference") {
    r.fail(".role", "the bundle has an IP-Adapter ('reference'), which this library does not draw with: use Python's, or "
                    "without --ip-adapter");
  }
  if (const std::string* role = r.get("role").as<std::string>(); role && *role == "control") {
    throw Error(Code::bundle, "the bundle has ControlNets, which libtgate does not run; draw with the Python runtime, or "
                              "export it again without --controlnet");
  }
  graph.role = r.choice("role", roles);
  graph.batch = read_range(r);
  graph.inputs = read_tensors(r, "inputs", graph.batch.most);
  graph.outputs = read_tensors(r, "outputs", graph.batch.most);
  Reader::all_of(r.inner("macs"), [&](Reader& macs) {
    graph.macs_paper = macs.whole("paper");
    graph.macs_all = macs.whole("all");
    return 0;
  });
  graph.scratch_bytes = r.whole("scratch_bytes");
  return graph;
}

Shape read_shape(Reader& r) {
  Shape shape;
  shape.width = r.whole("width", 1, most_size);
  shape.height = r.whole("height", 1, most_size);
  shape.batch = read_range(r);
  shape.latents = r.wholes("latents", most_size);
  const TensorSpec latents{"latents", Dtype::float32, shape.latents};
  if (shape.latents.size() > most_rank || latents.bytes(1) > most_tensor_bytes) {
    r.fail(".latents", "expected at most " + std::to_string(most_rank) + " dimensions and " +
                           std::to_string(most_tensor_bytes) + " bytes, got " + quoted(r.get("latents")));
  }
  for (const auto& [name, row] : r.named("constants")) {
    std::vector<float>& kept = shape.constants[name];
    for (const double number : r.numbers_of(row, ".constants." + name)) kept.push_back(static_cast<float>(number));
  }
  shape.graphs = r.table("graphs", read_graph, most_tensors);
  return shape;
}

FileDigest read_digest(Reader& r) {
  FileDigest digest;
  digest.sha256 = r.text("sha256");
  const bool hex = std::all_of(digest.sha256.begin(), digest.sha256.end(),
                               [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  if (digest.sha256.size() != 64 || !hex) {
    r.fail(".sha256", "expected 64 hexadecimal digits, got '" + shown(digest.sha256, 60) + "'");
  }
  digest.bytes = r.whole("bytes");
  return digest;
}

Conditioning read_conditioning(Reader& r) {
  if (const std::string* source = r.get("source").as<std::string>(); source && *source == "masked") {
    throw Error(Code::bundle, "the bundle is of an inpainting model, which libtgate does not run; draw with the Python "
                              "runtime");
  }
  return {r.word("name"), r.choice("source", sources), r.choice("negative", negatives)};
}

TokenizerSpec read_tokenizer(Reader& r) {
  TokenizerSpec tokenizer;
  tokenizer.file = r.name("file");
  tokenizer.input = r.word("input");
  tokenizer.length = r.whole("length", 2, most_rows);
  tokenizer.pad_id = r.whole("pad_id");
  return tokenizer;
}

Golden read_golden(Reader& r) {
  Golden golden;
  golden.file = r.name("file");
  golden.size = r.word("size");
  golden.tolerance = r.number("tolerance");
  golden.graph = r.text("graph").empty() ? "" : r.word("graph");
  if (!r.get("plan").as<std::nullptr_t>()) golden.plan = Reader::all_of(r.inner("plan"), Plan::read);
  golden.oracle = r.text("oracle");
  return golden;
}

/// An adapter's file.
std::string read_adapter(Reader& r) {
  std::string own = r.name("file");
  r.whole("layers", 1);
  r.whole("rank", 1);
  return own;
}

bool is_nested(const json::Value& value, int levels) {
  const auto deeper = [&](const json::Value& inner) { return levels == 0 || is_nested(inner, levels - 1); };
  if (const json::Array* array = value.as<json::Array>()) return std::any_of(array->begin(), array->end(), deeper);
  if (const json::Object* object = value.as<json::Object>()) {
    return std::any_of(object->begin(), object->end(), [&](const auto& member) { return deeper(member.second); });
  }
  return false;
}

/// The scheduler's configuration: whatever JSON holds, for whoever compiles samplers.
void check_scheduler(Reader& r) {
  r.object("scheduler");
  if (is_nested(r.get("scheduler"), most_depth - 1)) {
    r.fail(".scheduler", "expected an object that is nested at most " + std::to_string(most_depth) + " deep");
  }
}

void check_tools(Reader& r) {
  for (const auto& [name, value] : r.object("tools")) {
    if (!value.as<std::string>()) r.fail(".tools", "expected text values, got " + quoted(value));
  }
}

template <class T, class Name>
void check_names(const std::vector<T>& things, Name name, const Reader& r, const char* key) {
  std::vector<std::string_view> names;
  for (const T& thing : things) names.push_back(thing.*name);
  check_unique(std::move(names), r.where() + "." + key);
}

Manifest read_manifest(Reader& r) {
  Manifest m;
  r.whole("schema_version");
  m.model = r.text("model");
  m.family = r.text("family");
  m.licence = r.text("licence");
  m.dtype = read_dtype(r, "dtype");
  m.frames = r.whole("frames", 1, most_size);
  m.fps = r.whole("fps", 0, most_size);
  m.guidance = r.choice("guidance", guidances);
  m.guidance_scale = r.number("guidance_scale", 0, most_guidance);
  if (!m.takes_scale(m.guidance_scale)) {
    r.fail(".guidance_scale", "a bundle with guidance has a scale above 1, one without has none above; got " +
                                  json::repr(m.guidance_scale));
  }
  r.number("guidance_rescale", 0, 1);
  r.whole("clip_skip");
  m.zero_negative = r.flag("zero_negative");
  m.weights = r.text("weights").empty() ? "" : r.name("weights");
  m.samplers = r.text("samplers").empty() ? "" : r.name("samplers");
  m.shapes = r.items("shapes", read_shape, most_shapes);
  if (m.shapes.empty()) r.fail(".shapes", "expected at least one");
  for (const auto& [name, facts] : r.named("carries")) {
    r.check_facts(facts, ".carries." + name);
    m.carries.insert(name);
  }
  m.conditioning = r.items("conditioning", read_conditioning);
  check_names(m.conditioning, &Conditioning::name, r, "conditioning");
  m.tokenizers = r.items("tokenizers", read_tokenizer);
  check_names(m.tokenizers, &TokenizerSpec::input, r, "tokenizers");
  m.plans = r.table("plans", Plan::read, most_plans);
  m.goldens = r.table("goldens", read_golden, most_plans);
  for (auto& [name, digest] : r.table("files", read_digest, most_files)) m.files.emplace(check_name(name), digest);
  check_scheduler(r);
  check_tools(r);
  if (r.has("adapters")) {
    for (auto& [name, own] : r.table("adapters", read_adapter, most_adapters)) m.adapters.emplace(name, std::move(own));
  }
  return m;
}

/// The JSON object of a manifest of this version, without its digest, which it has proved. Throws Error.
json::Value read_object(std::string_view text) {
  json::Value value;
  try {
    value = json::parse(text);
  } catch (const json::ParseError& error) {
    throw Error(Code::bundle, std::string(file) + " is not JSON (" + error.what() +
                                  "); the bundle is damaged: export it again");
  }
  json::Object* object = std::get_if<json::Object>(&value.held);
  if (!object) {
    throw Error(Code::bundle, std::string(file) + " holds " + value.kind() + ", not an object; " + again);
  }
  const json::Value* found = value.find("schema_version");
  const std::int64_t* version = found ? found->as<std::int64_t>() : nullptr;
  if (!version) throw Error(Code::bundle, std::string(file) + " has no schema_version: this is not a tgate bundle");
  if (*version != schema_version) {
    throw Error(Code::bundle, "the bundle has schema version " + std::to_string(*version) + ", this library reads version " +
                                  std::to_string(schema_version) + "; " +
                                  (*version > schema_version ? "update libtgate"
                                                             : "export it again with tgate-export, from the same checkpoint"));
  }
  std::string digest;
  const auto own = std::find_if(object->begin(), object->end(), [](const auto& member) { return member.first == "digest"; });
  if (own != object->end()) {
    if (const std::string* said = own->second.as<std::string>()) digest = *said;
    object->erase(own);
  }
  if (digest != sha256_of(json::canonical(value))) {
    throw Error(Code::bundle, std::string(file) + " does not match its own digest; the bundle was damaged or edited by hand");
  }
  return value;
}

}  // namespace

Manifest Manifest::parse(std::string_view text) {
  if (text.size() > most_manifest_bytes) {
    throw Error(Code::bundle, std::string(file) + " holds more than " + std::to_string(most_manifest_bytes) +
                                  " bytes, which no manifest does");
  }
  const json::Value value = read_object(text);
  return Reader::all_of(Reader(value, file, Code::bundle, again), read_manifest);
}

}  // namespace tgate
