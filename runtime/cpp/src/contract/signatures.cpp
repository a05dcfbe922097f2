// Whether a bundle's graphs take and give what a host feeds and reads.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "contract/error.h"
#include "contract/manifest.h"

namespace tgate {
namespace {

using Names = std::unordered_set<std::string>;

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + shown(name);
  return text;
}

/// Whether graphs of a role make pictures of latents.
bool is_decoder(Role role) { return role == Role::decode || role == Role::preview; }

/// What can be fed to a graph of a role.
Names feeds(const Manifest& manifest, Role role) {
  Names names;
  if (role == Role::denoise) {
    names = {"latents", "noise", "step"};
    for (const char* past : {"latents.", "output."}) {
      for (int lag = 1; lag <= history; ++lag) names.insert(past + std::to_string(lag));
    }
    for (const Conditioning& tensor : manifest.conditioning) {
      names.insert(tensor.name + ".negative");
      names.insert(tensor.name + ".positive");
    }
    names.insert(manifest.carries.begin(), manifest.carries.end());
  } else if (role == Role::text) {
    for (const TokenizerSpec& tokenizer : manifest.tokenizers) names.insert(tokenizer.input);
  } else if (role == Role::image) {
    names = {"picture", "noise"};
  } else if (role == Role::encode) {
    names = {"picture"};
  } else {
    names = {"latents"};
  }
  return names;
}

/// What a graph of a role must give.
std::vector<std::string> needs(const Manifest& manifest, Role role) {
  if (role == Role::denoise) return {"next_latents", "output"};
  if (is_decoder(role)) return {"image"};
  if (role == Role::encode) return {"latents", "deviation"};
  std::vector<std::string> names;
  for (const Conditioning& tensor : manifest.conditioning) {
    if (tensor.source == (role == Role::text ? Source::text : Source::image)) names.push_back(tensor.name);
  }
  return names;
}

std::string shown_as(const std::string& name, Dtype dtype, const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t dim : shape) text += (text.empty() ? "" : ", ") + (dim < 0 ? "batch" : std::to_string(dim));
  return shown(name) + " as " + std::string(facts_of(dtype).name) + " [" + text + "]";
}

struct Form {
  Dtype dtype;
  std::vector<std::int64_t> shape;
};

/// The forms that a shape gives to tensors of a role's graphs, by their names.
std::unordered_map<std::string, Form> forms_of(const Shape& shape, Role role) {
  std::vector<std::int64_t> latents = shape.latents;
  if (role == Role::image) {
    return {{"picture", {Dtype::uint8, {1, shape.height, shape.width, 3}}},
            {"noise", {Dtype::float32, {1, 3, shape.height, shape.width}}}};
  }
  std::unordered_map<std::string, Form> forms;
  if (is_decoder(role)) {
    latents.insert(latents.begin(), 1);
    forms.emplace("latents", Form{Dtype::float32, latents});
  } else if (role == Role::encode) {
    latents.insert(latents.begin(), 1);
    forms.emplace("picture", Form{Dtype::uint8, {1, shape.height, shape.width, 3}});
    for (const char* name : {"latents", "deviation"}) forms.emplace(name, Form{Dtype::float32, latents});
  } else if (role == Role::denoise) {
    latents.insert(latents.begin(), -1);
    for (const char* name : {"latents", "output", "next_latents", "noise"}) forms.emplace(name, Form{Dtype::float32, latents});
    for (const char* past : {"latents.", "output."}) {
      for (int lag = 1; lag <= history; ++lag) forms.emplace(past + std::to_string(lag), Form{Dtype::float32, latents});
    }
    forms.emplace("step", Form{Dtype::float32, {-1, step_row_length}});
  }
  return forms;
}

/// What every graph of a role takes.
std::vector<std::string> always(Role role) {
  if (role == Role::denoise) return {"latents", "step"};
  if (is_decoder(role)) return {"latents"};
  return role == Role::image || role == Role::encode ? std::vector<std::string>{"picture"} : std::vector<std::string>{};
}

}  // namespace

void check_signatures(const Manifest& manifest, const std::vector<std::pair<std::string, const GraphSpec*>>& kept) {
  constexpr Role roles[] = {Role::denoise, Role::text, Role::image, Role::decode, Role::encode, Role::preview};
  std::unordered_map<Role, Names> fed;
  std::unordered_map<Role, std::vector<std::string>> needed;
  for (const Role role : roles) {
    fed[role] = feeds(manifest, role);
    needed[role] = needs(manifest, role);
  }
  // All denoising graphs of a shape work on the same buffers.
  std::unordered_map<std::string_view, const TensorSpec*> forms;
  for (const auto& [name, spec] : kept) {
    const std::string graph = "graph '" + shown(name) + "'";
    const auto refuse = [&](const std::string& what, const std::vector<std::string>& names, const char* rest) {
      if (!names.empty()) {
        throw Error(Code::bundle, graph + what + joined(names) + rest + "; export the bundle again");
      }
    };
    if (spec->role == Role::denoise) {
      for (const std::vector<TensorSpec>* tensors : {&spec->inputs, &spec->outputs}) {
        for (const TensorSpec& tensor : *tensors) {
          if (*forms.emplace(tensor.name, &tensor).first->second == tensor) continue;
          throw Error(Code::bundle, graph + " has " + shown(tensor.name) + " in another form than a graph beside it has");
        }
      }
    }
    const Names& known = fed[spec->role];
    Names taken;
    std::vector<std::string> odd, missing, unfed;
    for (const TensorSpec& tensor : spec->inputs) {
      taken.insert(tensor.name);
      if (!known.count(tensor.name)) odd.push_back(tensor.name);
    }
    refuse(" takes ", odd, ", which nothing feeds");
    for (const std::string& output : needed[spec->role]) {
      if (!spec->output(output)) missing.push_back(output);
    }
    refuse(" does not give ", missing, "");
    if (spec->role != Role::text) continue;
    std::copy_if(known.begin(), known.end(), std::back_inserter(unfed),
                 [&](const std::string& input) { return !taken.count(input); });
    std::sort(unfed.begin(), unfed.end());
    refuse(" has no input ", unfed, "");
  }
}

void check_forms(const Shape& shape, const std::vector<std::pair<std::string, const GraphSpec*>>& kept) {
  for (const auto& [name, spec] : kept) {
    const auto refuse = [&, &name = name](const std::string& what) {
      throw Error(Code::bundle, "graph '" + shown(name) + "' " + what + "; export the bundle again");
    };
    std::vector<std::string> missing;
    for (const std::string& input : always(spec->role)) {
      if (spec->input(input) == nullptr) missing.push_back(input);
    }
    if (!missing.empty()) refuse("has no input " + joined(missing));
    const bool by_image = spec->role == Role::denoise;
    const Range &own = spec->batch, &asked = shape.batch;
    if (by_image && (asked.least < own.least || asked.most > own.most)) {
      refuse("is for " + std::to_string(own.least) + " to " + std::to_string(own.most) + " images, and its shape for " +
             std::to_string(asked.least) + " to " + std::to_string(asked.most));
    }
    const auto forms = forms_of(shape, spec->role);
    for (const std::vector<TensorSpec>* tensors : {&spec->inputs, &spec->outputs}) {
      for (const TensorSpec& tensor : *tensors) {
        const std::string is = "has " + shown_as(tensor.name, tensor.dtype, tensor.shape);
        if (by_image && !tensor.by_image()) refuse(is + ", without a row for each image");
        std::vector<std::int64_t> dims = tensor.shape;
        if (!by_image && tensor.by_image()) dims.front() = 1;
        Form wanted{tensor.dtype, dims};
        if (is_decoder(spec->role) && tensor.name == "image") {  // a video's frames come before
          std::vector<std::int64_t> pixels{1};
          if (dims.size() > 3) pixels.assign(dims.begin(), dims.end() - 3);
          for (const std::int64_t side : {shape.height, shape.width, std::int64_t{3}}) pixels.push_back(side);
          wanted = {Dtype::uint8, std::move(pixels)};
        } else if (const auto found = forms.find(tensor.name); found != forms.end()) {
          wanted = found->second;
        }
        if (wanted.dtype != tensor.dtype || wanted.shape != dims) {
          refuse(is + ", where " + shown_as(tensor.name, wanted.dtype, wanted.shape) + " is wanted");
        }
      }
    }
  }
}

void check_ranges(const std::vector<const Shape*>& shapes, const std::set<std::string>& names) {
  const Shape& first = *shapes.front();
  const auto text_of = [](const Range& range) { return std::to_string(range.least) + " to " + std::to_string(range.most); };
  const auto alike = [](const std::vector<TensorSpec>& one, const std::vector<TensorSpec>& two) {
    return one.size() == two.size() && std::is_permutation(one.begin(), one.end(), two.begin());
  };
  for (const Shape* other : shapes) {
    const std::string ranges = text_of(first.batch) + " and " + text_of(other->batch) + " images; export the bundle again";
    if (other->latents != first.latents) throw Error(Code::bundle, first.size() + " has other latents for " + ranges);
    for (const std::string& name : names) {
      const GraphSpec &one = *find(first.graphs, name), &two = *find(other->graphs, name);
      if (alike(one.inputs, two.inputs) && alike(one.outputs, two.outputs)) continue;
      throw Error(Code::bundle, "graph '" + shown(name) + "' of " + first.size() + " takes and gives other tensors for " + ranges);
    }
  }
}

}  // namespace tgate
