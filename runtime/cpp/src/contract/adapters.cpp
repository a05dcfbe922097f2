#include "contract/adapters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <string_view>

#include "contract/all_cores.h"
#include "contract/error.h"
#include "contract/mapped_weights.h"
#include "contract/numbers.h"
#include "contract/reader.h"

// ThreadSanitizer is not there yet when the linker asks which of them the processor can run.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define TGATE_FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TGATE_FOR_EACH_PROCESSOR
#endif

namespace tgate {
namespace {

constexpr std::size_t most_bytes = std::size_t{1} << 31;  // of an adapter's file
constexpr std::string_view turned = "^T";  // how the name of a weight ends that is held as [inputs, outputs]

/// A tensor of an adapter's file.
struct Part {
  Placed place;
  const char* data{};
};
/// What one adapter adds to one weight: by their marks, "#up", "#down" and "#factor", or "#bias".
struct Change {
  const std::string* adapter{};
  float scale{};
  std::map<std::string, Part, std::less<>> parts;
};
struct File {
  std::string data;
  std::map<std::string, Change, std::less<>> changes;  // by the weights' names
};

Error unfit(const Bundle& bundle, const std::string& adapter, const std::string& why) {
  return {Code::bundle, bundle.path() + ": adapter '" + shown(adapter) + "' does not fit the bundle's weights: " + why +
                            "; add it again with `tgate adapt --force`"};
}

std::string quoted(std::string_view weight) { return "'" + shown(weight) + "'"; }

std::string listed(const std::vector<std::int64_t>& sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::string words_of(const Scales& scales) {
  std::string words;
  for (const auto& [name, scale] : scales) words += (words.empty() ? "" : ", ") + name + ":" + json::repr(scale);
  return words;
}

std::vector<float> numbers(const Part& part) {
  std::vector<float> values(static_cast<std::size_t>(part.place.length) / facts_of(part.place.dtype).bytes);
  decode(part.data, values.size(), part.place.dtype, values.data());
  return values;
}

File read_adapter(const Bundle& bundle, const std::string& adapter, float scale) {
  const std::string& name = bundle.manifest().adapters.find(adapter)->second;
  File file{bundle.read(name, most_bytes), {}};
  Places places;
  try {
    places = parse_places(file.data, file.data.size(), name);
  } catch (const Error& error) {
    throw unfit(bundle, adapter, shown(error.what(), 200));
  }
  for (auto& [key, place] : places) {
    const std::size_t mark = key.rfind('#');
    if (mark == std::string::npos || mark == 0) throw unfit(bundle, adapter, "it has a tensor " + quoted(key));
    const Part part{place, file.data.data() + place.offset};
    const auto count = static_cast<std::size_t>(place.length) / facts_of(place.dtype).bytes;
    if ((place.dtype != Dtype::float16 && place.dtype != Dtype::float32) || not_finite(part.data, count, place.dtype) > 0) {
      throw unfit(bundle, adapter, quoted(key) + " has " + std::string(facts_of(place.dtype).name) +
                                       " or numbers that are not finite");
    }
    Change& change = file.changes[key.substr(0, mark)];
    change.scale = scale;
    change.parts.emplace(key.substr(mark), part);
  }
  for (const auto& [weight, change] : file.changes) {
    std::set<std::string_view> marks;
    for (const auto& part : change.parts) marks.insert(part.first);
    if (marks != std::set<std::string_view>{"#bias"} && marks != std::set<std::string_view>{"#down", "#factor", "#up"}) {
      throw unfit(bundle, adapter, "it has not both factors, or one bias, of " + quoted(weight));
    }
  }
  return file;
}

/// row += by * from, `count` numbers.
TGATE_FOR_EACH_PROCESSOR
void add_times(float* row, const float* from, float by, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) row[i] += by * from[i];
}

/// Adds a change to `values`, those of a weight of that shape as the LoRA has it: [outputs, …]; `flip` where they lie as
/// [inputs, outputs]. False where the change has another shape.
bool add(const Change& change, std::vector<float>& values, const std::vector<std::int64_t>& shape, bool flip) {
  const std::int64_t outputs = shape.empty() ? 0 : shape.front();
  const std::int64_t inner = outputs > 0 ? static_cast<std::int64_t>(values.size()) / outputs : 0;
  const auto bias = change.parts.find("#bias");
  if (bias != change.parts.end()) {
    if (bias->second.place.shape != std::vector<std::int64_t>{outputs}) return false;
    const std::vector<float> added = numbers(bias->second);
    if (inner != 1 || shape.size() != 1) return false;
    add_times(values.data(), added.data(), change.scale, added.size());
    return true;
  }
  const Part &up = change.parts.find("#up")->second, &down = change.parts.find("#down")->second;
  const Part& factor = change.parts.find("#factor")->second;
  const bool plain = up.place.shape.size() == 2 && down.place.shape.size() == 2 &&
                     up.place.shape[1] == down.place.shape[0] && factor.place.shape == std::vector<std::int64_t>{1};
  if (!plain || up.place.shape[0] != outputs || down.place.shape[1] != inner || shape.size() < 2) return false;
  const std::vector<float> left = numbers(up), right = numbers(down);
  const float by = numbers(factor).front();
  const auto rank = static_cast<std::size_t>(up.place.shape[1]), width = static_cast<std::size_t>(inner);
  const auto rows = static_cast<std::size_t>(outputs);
  std::vector<float> row(width);
  for (std::size_t output = 0; output < rows; ++output) {
    std::fill(row.begin(), row.end(), 0.0F);
    for (std::size_t r = 0; r < rank; ++r) add_times(row.data(), right.data() + r * width, left[output * rank + r], width);
    for (float& number : row) number *= by;
    if (!flip) {
      add_times(values.data() + output * width, row.data(), change.scale, width);
    } else {
      for (std::size_t i = 0; i < width; ++i) values[i * rows + output] += change.scale * row[i];
    }
  }
  return true;
}

HostWeight changed(const Bundle& bundle, const std::string& name, const Placed& place, const std::byte* stored,
                   const std::vector<const Change*>& changes) {
  HostWeight weight{place.dtype, place.shape, std::vector<std::byte>(static_cast<std::size_t>(place.length))};
  std::vector<float> values(weight.data.size() / facts_of(place.dtype).bytes);
  decode(stored, values.size(), place.dtype, values.data());
  const bool flip = name.size() > turned.size() && std::string_view(name).substr(name.size() - turned.size()) == turned;
  std::vector<std::int64_t> shape = place.shape;
  if (flip) std::reverse(shape.begin(), shape.end());
  for (const Change* change : changes) {
    if (!add(*change, values, shape, flip)) {
      std::string parts;
      for (const auto& [mark, part] : change->parts) parts += (parts.empty() ? "" : ", ") + mark + " " + listed(part.place.shape);
      throw unfit(bundle, *change->adapter, quoted(name) + " is " + listed(shape) + ", its change " + parts);
    }
  }
  encode(values.data(), values.size(), place.dtype, weight.data.data());
  if (not_finite(weight.data.data(), values.size(), place.dtype) > 0) {
    throw Error(Code::request, "with those adapters, weight " + quoted(name) + " does not fit into " +
                                   std::string(facts_of(place.dtype).name) + "; take smaller scales");
  }
  return weight;
}

void check(const Bundle& bundle, const Scales& scales) {
  const auto& adapters = bundle.manifest().adapters;
  std::string have;
  for (const auto& adapter : adapters) have += (have.empty() ? "" : ", ") + adapter.first;
  for (const auto& [name, scale] : scales) {
    if (adapters.find(name) == adapters.end()) {
      throw Error(Code::request, "the bundle has no adapter '" + shown(name) + "'; it has " +
                                     (have.empty() ? "none; `tgate adapt` adds one" : have));
    }
    if (!(std::abs(scale) > 0 && std::abs(scale) <= most_adapter_scale)) {  // nor is what is no number
      throw Error(Code::request, "the scale of adapter '" + name + "' is " + json::repr(scale) +
                                     "; a number other than 0, which would change nothing, and of at most " +
                                     std::to_string(static_cast<int>(most_adapter_scale)) + " is wanted");
    }
  }
}

}  // namespace

Instead weights_with(const Bundle& bundle, const Scales& scales) {
  check(bundle, scales);
  const Places places = bundle.places();
  const MappedWeights mapped(bundle);
  std::vector<File> files;
  files.reserve(scales.size());  // changes point into them
  std::map<std::string, std::vector<const Change*>, std::less<>> added;
  for (const auto& [name, scale] : scales) {
    files.push_back(read_adapter(bundle, name, static_cast<float>(scale)));
    for (auto& [weight, change] : files.back().changes) {
      if (places.find(weight) == places.end()) throw unfit(bundle, name, "weight " + quoted(weight) + " is not there");
      change.adapter = &name;
      added[weight].push_back(&change);
    }
  }
  std::vector<std::pair<const std::string*, HostWeight>> made;
  for (const auto& each : added) made.emplace_back(&each.first, HostWeight{});
  on_all_cores(made.size(), [&](std::size_t i) {
    const std::string& name = *made[i].first;
    const Placed& place = places.find(name)->second;
    made[i].second = changed(bundle, name, place, mapped.at(place), added.find(name)->second);
  });
  bool same = true;
  Instead instead;
  for (auto& [name, weight] : made) {
    same = same && std::memcmp(weight.data.data(), mapped.at(places.find(*name)->second), weight.data.size()) == 0;
    instead.emplace(*name, std::move(weight));
  }
  if (same) {
    throw Error(Code::request, "with " + words_of(scales) + ", no weight changes in " +
                                   std::string(facts_of(bundle.manifest().dtype).name) + "; take larger scales");
  }
  return instead;
}

}  // namespace tgate
