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
  } else {
    names = {"latents"};
  }
  return names;
}

/// What a graph of a role must give.
std::vector<std::string> needs(const Manifest& manifest, Role role) {
  if (role == Role::denoise) return {"next_latents", "output"};
  if (role == Role::decode) return {"image"};
  std::vector<std::string> names;
  for (const Conditioning& tensor : manifest.conditioning) {
    if (tensor.source == (role == Role::text ? Source::text : Source::image)) names.push_back(tensor.name);
  }
  return names;
}

}  // namespace

void check_signatures(const Manifest& manifest, const std::vector<std::pair<std::string, const GraphSpec*>>& kept) {
  constexpr Role roles[] = {Role::denoise, Role::text, Role::image, Role::decode};
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

}  // namespace tgate
