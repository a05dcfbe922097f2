// The facts about a bundle, readable without loading a model.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "contract/plan.h"

namespace tgate {

/// How large a manifest may be: hundreds of plans of 50 steps over SDXL's 140 carries.
inline constexpr std::size_t most_manifest_bytes = 32u << 20;

struct FileDigest {
  std::string sha256;  ///< hex
  std::int64_t bytes{};
};

struct TokenizerSpec {
  std::string file, input;
  std::int64_t length{}, pad_id{};
};

enum class Source : std::uint8_t { text, image, constant };
enum class Negative : std::uint8_t { own, same, zeros };
enum class Guidance : std::uint8_t { classifier_free, embedded, none };

/// One tensor that conditions the denoiser: its graphs take it as `<name>.negative` and `<name>.positive`.
struct Conditioning {
  std::string name;
  Source source{};
  Negative negative{};
};

struct Golden {
  std::string file, size, graph, oracle;
  double tolerance{};
  std::optional<Plan> plan;
};

/// What was exported for one size and one range of batches.
struct Shape {
  std::int64_t width{}, height{};
  Range batch;
  std::vector<std::int64_t> latents;  ///< of one image
  std::map<std::string, std::vector<float>> constants;
  Graphs graphs;

  [[nodiscard]] std::string size() const { return std::to_string(width) + "x" + std::to_string(height); }
  [[nodiscard]] std::int64_t latents_count() const;
  /// The one graph of a role other than denoise; null where the export left it out.
  [[nodiscard]] const GraphSpec* graph(Role role) const;
};

struct Manifest {
  std::string model, family, licence, weights, samplers;
  Dtype dtype{};
  std::int64_t frames{}, fps{};
  Guidance guidance{};
  double guidance_scale{};
  bool zero_negative{};
  std::vector<Shape> shapes;
  std::set<std::string> carries;
  std::vector<Conditioning> conditioning;
  std::vector<TokenizerSpec> tokenizers;
  std::vector<std::pair<std::string, Plan>> plans;      ///< in the manifest's order
  std::vector<std::pair<std::string, Golden>> goldens;  ///< in the manifest's order
  std::map<std::string, FileDigest> files;
  std::map<std::string, std::string, std::less<>> adapters;  ///< their files, by their names

  [[nodiscard]] bool guided() const { return guidance == Guidance::classifier_free; }
  /// Whether the graphs go by such a guidance scale: those of both halves by one above 1, those of one half by none.
  [[nodiscard]] bool takes_scale(double scale) const {
    return guidance == Guidance::embedded || (scale > 1) == guided();
  }
  /// Sees that a plan of this bundle, or one that came in a file, has such a scale. Throws Error of Code::plan.
  void check_scale(const Plan& plan) const;
  /// Throws Error of Code::bundle, which lists the plans there are.
  [[nodiscard]] const Plan& plan(std::string_view name) const;
  /// The sizes there are, each once, the default first.
  [[nodiscard]] std::vector<std::string> sizes() const;
  /// The shapes of a size, smallest batches first; the default's where `size` is empty. Throws Error of Code::bundle,
  /// which lists the sizes there are.
  [[nodiscard]] std::vector<const Shape*> shapes_of(std::string_view size) const;

  /// Reads a manifest. Throws Error of Code::bundle (or plan) for anything that Python would not read either.
  static Manifest parse(std::string_view text);
};

/// Raises Error of Code::bundle where the graphs of a shape do not take and give what a host feeds and reads; `kept`
/// are those that a session would load. As `tgate_runtime.signatures`.
void check_signatures(const Manifest& manifest, const std::vector<std::pair<std::string, const GraphSpec*>>& kept);

/// Raises Error of Code::bundle where a graph of a shape is not for its latents, pictures and batches, or lacks what is
/// fed to every graph of its role: buffers are as large as the graphs say, and filled with what the shape says.
void check_forms(const Shape& shape, const std::vector<std::pair<std::string, const GraphSpec*>>& kept);

/// Raises Error of Code::bundle where the shapes of one size, which differ in their batches, differ in their latents or
/// in what the graphs of `names` take and give: their images lie in the same buffers. All have those graphs.
void check_ranges(const std::vector<const Shape*>& shapes, const std::set<std::string>& names);

/// The tensors that walking `plans` needs, each of which has one buffer: what their graphs take, what every step gives,
/// and the carries that are written. In order of first use.
std::vector<TensorSpec> buffers_of(const Graphs& graphs, const std::vector<const Plan*>& plans);

/// What a request for `images` images takes, in bytes, on an engine that keeps one copy of the weights.
struct Memory {
  std::int64_t weights{}, request{}, scratch{}, peak{};
};
Memory memory_of(const Manifest& manifest, const Shape& shape, const Plan& plan, std::int64_t images);

}  // namespace tgate
