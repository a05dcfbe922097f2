#include "contract/bundle.h"

#include <algorithm>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include <sys/stat.h>

#include "contract/all_cores.h"
#include "contract/error.h"
#include "contract/reader.h"
#include "contract/sha256.h"
#include "contract/text.h"

namespace tgate {
namespace {

constexpr char manifest_file[] = "manifest.json";
constexpr std::uint64_t most_header_bytes = 64u << 20;  // of weights: a hundred times SDXL's, which names 2,500 tensors

[[noreturn]] void fail(const std::string& text) { throw Error(Code::bundle, text); }

std::string place_of(const std::string& path) { return shown(path, 1000); }

std::string read_manifest(const std::string& root) {
  struct stat found {};
  if (::stat(root.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    fail(place_of(root) + " is not a bundle: there is no such directory. Make one with `tgate-export`.");
  }
  try {
    return PlainFile::open_inside(root, manifest_file).read(most_manifest_bytes);
  } catch (const NotThere&) {
    fail(place_of(root) + " is not a bundle: it has no " + manifest_file);
  } catch (const FileError& error) {
    fail(place_of(root) + " is not a bundle: " + manifest_file + " cannot be read as a plain file (" + error.what() + ")");
  }
}

/// Does what is given with a listed file, open. A file that cannot be read is a fault of the bundle's.
template <class Use>
auto with_file(const std::string& root, const std::string& name, Use use) {
  try {
    PlainFile file = PlainFile::open_inside(root, check_name(name));
    return use(file);
  } catch (const FileError& error) {
    fail(place_of(root) + ": " + name + " is missing or not a plain file (" + error.what() +
         "); copy or export the bundle again");
  }
}

[[noreturn]] void fail_changed(const std::string& root, const std::string& name) {
  fail(place_of(root) + ": " + name + " was changed after it was checked; open the bundle again");
}

void check_size(const std::string& root, const std::string& name, std::int64_t bytes, const FileDigest& wanted) {
  if (bytes == wanted.bytes) return;
  fail(place_of(root) + ": " + name + " holds " + std::to_string(bytes) + " bytes, the manifest says " +
       std::to_string(wanted.bytes) + "; the bundle is damaged: copy or export it again");
}

void check_digest(const std::string& root, const std::string& name, const std::string& digest, const FileDigest& wanted) {
  if (digest == wanted.sha256) return;
  fail(place_of(root) + ": " + name + " has SHA-256 " + digest.substr(0, 16) + "…, the manifest says " +
       wanted.sha256.substr(0, 16) + "…; the bundle is damaged: copy or export it again");
}

void check_digests(const std::string& root, const Manifest& manifest,
                   const std::map<std::string, FileState, std::less<>>& states) {
  // The largest first, so that no thread is left with one at the end.
  std::vector<std::pair<std::string, FileDigest>> files(manifest.files.begin(), manifest.files.end());
  std::stable_sort(files.begin(), files.end(),
                   [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
  on_all_cores(files.size(), [&](std::size_t i) {
    const auto& [name, wanted] = files[i];
    with_file(root, name, [&, &name = name, &wanted = wanted](PlainFile& file) {
      const FileState before = file.state();
      check_digest(root, name, file.sha256(), wanted);
      if (before != states.at(name) || file.state() != before) fail_changed(root, name);
    });
  });
}

/// Every file that the manifest speaks of is listed, every constant is there, and goldens name what there is.
void check_references(const std::string& root, const Manifest& manifest) {
  const auto listed = [&](const std::string& name) {
    if (!manifest.files.count(name)) {
      fail(place_of(root) + ": the manifest lists no file '" + shown(name, 60) + "'; export the bundle again");
    }
  };
  for (const std::string& name : {manifest.weights, manifest.samplers}) {
    if (!name.empty()) listed(name);
  }
  for (const Shape& shape : manifest.shapes) {
    for (const auto& graph : shape.graphs) listed(graph.second.file);
  }
  for (const TokenizerSpec& tokenizer : manifest.tokenizers) listed(tokenizer.file);
  for (const auto& adapter : manifest.adapters) listed(adapter.second);
  for (const Shape& shape : manifest.shapes) {
    for (const Conditioning& tensor : manifest.conditioning) {
      if (tensor.source != Source::constant) continue;
      const auto row = shape.constants.find(tensor.name);
      if (row == shape.constants.end() || row->second.empty()) {
        fail(place_of(root) + ": " + shape.size() + " has no constant '" + shown(tensor.name) +
             "'; export the bundle again");
      }
    }
  }
  std::unordered_map<const Shape*, PlanCheck> checks;
  for (const auto& [name, golden] : manifest.goldens) {
    listed(golden.file);
    const Shape* shape = manifest.shapes_of(golden.size).front();
    if (golden.plan) {
      checks.try_emplace(shape, shape->graphs, manifest.carries).first->second(*golden.plan);
    } else if (!find(shape->graphs, golden.graph)) {
      fail(place_of(root) + ": golden " + shown(name) + " names graph '" + shown(golden.graph) + "', which is not there");
    }
  }
}

void check_plans(const Manifest& manifest) {
  std::unordered_set<std::string_view> names;
  for (const auto& entry : manifest.plans) names.insert(entry.first);
  std::vector<PlanCheck> checks;
  for (const Shape& shape : manifest.shapes) checks.emplace_back(shape.graphs, manifest.carries);
  for (const auto& [name, plan] : manifest.plans) {
    if (plan.name != name) {
      throw Error(Code::plan, "plan '" + shown(plan.name) + "' is listed as '" + shown(name) +
                                  "'. Make it again with `tgate plan`.");
    }
    manifest.check_scale(plan);
    for (const PlanCheck& check : checks) check(plan);
    for (const std::string& baseline : plan.baselines) {
      if (names.count(baseline)) continue;
      throw Error(Code::plan, "plan '" + shown(name) + "' names baseline '" + shown(baseline) +
                                  "', which is not there. Make it again with `tgate plan`.");
    }
  }
}

/// What is looked up by a name is there once: a shape by its size and batch, a graph by its file.
void check_shapes(const std::string& root, const Manifest& manifest) {
  std::set<std::pair<std::string, Range>> shapes;
  std::unordered_map<std::string_view, const GraphSpec*> graphs;
  for (const Shape& shape : manifest.shapes) {
    if (!shapes.emplace(shape.size(), shape.batch).second) {
      fail(place_of(root) + ": there are two shapes " + shape.size() + " of batch [" + std::to_string(shape.batch.least) +
           ", " + std::to_string(shape.batch.most) + "]");
    }
    for (const auto& [name, spec] : shape.graphs) {
      if (!(*graphs.emplace(spec.file, &spec).first->second == spec)) {
        fail(place_of(root) + ": " + spec.file + " is described twice, and differently");
      }
    }
  }
}

}  // namespace

Bundle Bundle::open(const std::string& path, bool digests) {
  Bundle bundle;
  bundle.path_ = path;
  bundle.manifest_ = Manifest::parse(read_manifest(path));
  const Manifest& manifest = bundle.manifest_;
  check_references(path, manifest);
  for (const auto& [name, wanted] : manifest.files) {
    const FileState state = with_file(path, name, [](const PlainFile& file) { return file.state(); });
    check_size(path, name, state.bytes, wanted);
    bundle.states_.emplace(name, state);
  }
  if (digests) check_digests(path, manifest, bundle.states_);
  check_plans(manifest);
  check_shapes(path, manifest);
  return bundle;
}

std::string Bundle::read(std::string_view name, std::size_t most_bytes) const {
  const std::string own(name);
  const auto wanted = manifest_.files.find(own);
  if (wanted == manifest_.files.end()) {
    fail(place_of(path_) + ": the manifest lists no file '" + shown(name, 60) + "'; export the bundle again");
  }
  return with_file(path_, own, [&](PlainFile& file) {
    check_size(path_, own, file.state().bytes, wanted->second);
    std::string content = file.read(most_bytes);
    check_digest(path_, own, sha256_of(content), wanted->second);
    return content;
  });
}

void Bundle::check_unchanged(const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    const auto known = states_.find(name);
    if (known == states_.end()) continue;
    const FileState state = with_file(path_, name, [](const PlainFile& file) { return file.state(); });
    if (state != known->second) fail_changed(path_, name);
  }
}

Places Bundle::places() const {
  const std::string& name = manifest_.weights;
  if (name.empty()) return {};
  const auto [head, bytes] = with_file(path_, name, [&](PlainFile& file) {
    const FileState state = file.state();
    if (state != states_.at(name)) fail_changed(path_, name);
    std::string first = file.read_some(8);
    if (first.size() == 8) {
      std::uint64_t header_bytes = 0;
      for (std::size_t i = 8; i-- > 0;) header_bytes = header_bytes << 8 | static_cast<unsigned char>(first[i]);
      if (header_bytes > most_header_bytes) {
        fail(place_of(path_) + ": " + name + " is not a whole weight file (its header would hold " +
             std::to_string(header_bytes) + " bytes, of at most " + std::to_string(most_header_bytes) +
             "); export the bundle again");
      }
      first += file.read_some(static_cast<std::size_t>(header_bytes));
    }
    return std::make_pair(first, static_cast<std::uint64_t>(state.bytes));
  });
  return parse_places(head, bytes, name);
}

}  // namespace tgate
