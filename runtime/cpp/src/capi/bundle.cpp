// Versions, errors and bundles.
#include <algorithm>

#include "capi/handles.h"

namespace tgate::capi {
namespace {

tgate_error no_memory{TGATE_MEMORY, "there is no memory left"};

}  // namespace

tgate_code report(tgate_error** error, Code code, const char* text) noexcept {
  const auto number = static_cast<tgate_code>(code);
  if (error != nullptr) {
    try {
      *error = new tgate_error{number, text};
    } catch (...) {
      *error = &no_memory;
    }
  }
  return number;
}

std::vector<std::string> texts(const char* const* names, std::size_t count, const char* what) {
  std::vector<std::string> all;
  for (std::size_t i = 0; i < (names == nullptr ? 0 : count); ++i) {
    all.emplace_back(&needed(names[i], what));
  }
  if (names != nullptr && count == 0) {
    throw Error(Code::argument, std::string(what) + " is a list of none; leave it NULL");
  }
  return all;
}

namespace {

/// The conditioning that the denoising graphs of a shape take, without constants.
std::vector<TensorSpec> brought(const Manifest& manifest, const Shape& shape) {
  std::vector<TensorSpec> tensors;
  for (const Conditioning& conditioning : manifest.conditioning) {
    for (const char* half : {".negative", ".positive"}) {
      const TensorSpec* found = nullptr;
      for (const auto& [name, graph] : shape.graphs) {
        const TensorSpec* input = graph.role == Role::denoise ? graph.input(conditioning.name + half) : nullptr;
        found = input != nullptr ? input : found;
      }
      if (conditioning.source != Source::constant && found != nullptr) {
        tensors.push_back(*found);
      }
    }
  }
  return tensors;
}

constexpr tgate_bundle_options default_bundle{sizeof(tgate_bundle_options), 1};

}  // namespace
}  // namespace tgate::capi

using tgate::Role;
using tgate::capi::guarded;
using tgate::capi::initialise;
using tgate::capi::needed;
using tgate::capi::put;

#define TGATE_TEXT(x) #x
#define TGATE_DOTTED(a, b, c) TGATE_TEXT(a) "." TGATE_TEXT(b) "." TGATE_TEXT(c)

const char* tgate_version(void) { return TGATE_DOTTED(TGATE_VERSION_MAJOR, TGATE_VERSION_MINOR, TGATE_VERSION_PATCH); }

tgate_code tgate_error_code(const tgate_error* error) { return error == nullptr ? TGATE_OK : error->code; }
const char* tgate_error_text(const tgate_error* error) { return error == nullptr ? "" : error->text.c_str(); }
void tgate_error_free(tgate_error* error) {
  if (error != &tgate::capi::no_memory) {
    delete error;
  }
}

tgate_code tgate_bundle_options_init(tgate_bundle_options* options, size_t size) {
  return initialise(options, size, tgate::capi::default_bundle);
}

tgate_code tgate_bundle_open(const char* path, const tgate_bundle_options* options, tgate_bundle** bundle,
                             tgate_error** error) {
  return guarded(error, [&] {
    const std::string place = &needed(path, "path");
    auto*& target = needed(bundle, "bundle");
    const auto chosen = tgate::capi::taken(options, tgate::capi::default_bundle, "tgate_bundle_options");
    auto made = std::make_unique<tgate_bundle>();
    made->bundle = std::make_shared<const tgate::Bundle>(tgate::Bundle::open(place, chosen.check_digests != 0));
    const tgate::Manifest& manifest = made->bundle->manifest();
    made->sizes = manifest.sizes();
    for (const auto& adapter : manifest.adapters) made->adapters.push_back(adapter.first);
    for (const std::string& size : made->sizes) {
      made->tensors.push_back(tgate::capi::brought(manifest, *manifest.shapes_of(size).front()));
    }
    target = made.release();
  });
}

void tgate_bundle_free(tgate_bundle* bundle) { delete bundle; }

tgate_code tgate_bundle_facts_init(tgate_bundle_facts* facts, size_t size) { return initialise(facts, size, {}); }

tgate_code tgate_bundle_facts_get(const tgate_bundle* bundle, tgate_bundle_facts* facts, tgate_error** error) {
  return guarded(error, [&] {
    const tgate_bundle& own = needed(bundle, "bundle");
    const tgate::Manifest& manifest = own.bundle->manifest();
    const tgate::Shape& shape = manifest.shapes.front();
    tgate_bundle_facts found{};
    found.model = manifest.model.c_str();
    found.family = manifest.family.c_str();
    found.licence = manifest.licence.c_str();
    found.dtype = tgate::facts_of(manifest.dtype).name.data();
    found.plans = manifest.plans.size();
    found.sizes = own.sizes.size();
    found.tokenizers = manifest.tokenizers.size();
    found.frames = static_cast<int32_t>(manifest.frames);
    found.fps = static_cast<int32_t>(manifest.fps);
    found.takes_prompt = shape.graph(Role::text) != nullptr;
    found.takes_picture = shape.graph(Role::image) != nullptr;
    found.decodes = shape.graph(Role::decode) != nullptr;
    found.guided = manifest.guided();
    put(needed(facts, "facts"), found, "tgate_bundle_facts");
  });
}

const char* tgate_bundle_plan(const tgate_bundle* bundle, size_t index) {
  const bool there = bundle != nullptr && index < bundle->bundle->manifest().plans.size();
  return there ? bundle->bundle->manifest().plans[index].first.c_str() : nullptr;
}

const char* tgate_bundle_size(const tgate_bundle* bundle, size_t index) {
  return bundle != nullptr && index < bundle->sizes.size() ? bundle->sizes[index].c_str() : nullptr;
}

const char* tgate_bundle_adapter(const tgate_bundle* bundle, size_t index) {
  return bundle != nullptr && index < bundle->adapters.size() ? bundle->adapters[index].c_str() : nullptr;
}

tgate_code tgate_tensor_facts_init(tgate_tensor_facts* facts, size_t size) { return initialise(facts, size, {}); }

tgate_code tgate_bundle_tensor(const tgate_bundle* bundle, const char* image_size, size_t index, tgate_tensor_facts* facts,
                               tgate_error** error) {
  return guarded(error, [&] {
    const tgate_bundle& own = needed(bundle, "bundle");
    const std::string size = own.bundle->manifest().shapes_of(tgate::capi::text_or(image_size, "")).front()->size();
    const auto place = std::find(own.sizes.begin(), own.sizes.end(), size) - own.sizes.begin();
    const auto& tensors = own.tensors[static_cast<std::size_t>(place)];
    if (index >= tensors.size()) {
      throw tgate::Error(tgate::Code::argument, "there are " + std::to_string(tensors.size()) + " tensors, got number " +
                                                    std::to_string(index));
    }
    const tgate::TensorSpec& tensor = tensors[index];
    tgate_tensor_facts found{};
    found.name = tensor.name.c_str();
    found.dtype = tgate::facts_of(tensor.dtype).name.data();
    found.rank = tensor.by_image() ? tensor.shape.size() - 1 : tensor.shape.size();
    std::copy(tensor.shape.end() - static_cast<std::ptrdiff_t>(found.rank), tensor.shape.end(), found.shape);
    put(needed(facts, "facts"), found, "tgate_tensor_facts");
  });
}

tgate_code tgate_memory_init(tgate_memory* memory, size_t size) { return initialise(memory, size, {}); }

tgate_code tgate_bundle_memory(const tgate_bundle* bundle, const char* plan, const char* image_size, size_t images,
                               tgate_memory* memory, tgate_error** error) {
  return guarded(error, [&] {
    const tgate::Manifest& manifest = needed(bundle, "bundle").bundle->manifest();
    const auto shapes = manifest.shapes_of(tgate::capi::text_or(image_size, ""));
    const auto rows = static_cast<std::int64_t>(tgate::rows_of_calls(shapes, images));
    const auto found =
        tgate::memory_of(manifest, *shapes.front(), manifest.plan(tgate::capi::text_or(plan, "default")), rows);
    tgate_memory result{};
    result.weights = static_cast<uint64_t>(found.weights);
    result.request = static_cast<uint64_t>(found.request);
    result.scratch = static_cast<uint64_t>(found.scratch);
    result.peak = static_cast<uint64_t>(found.peak);
    put(needed(memory, "memory"), result, "tgate_memory");
  });
}
