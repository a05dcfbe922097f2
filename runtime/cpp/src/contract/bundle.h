// The directory that holds everything, opened distrustfully.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "contract/manifest.h"
#include "contract/plain_files.h"

namespace tgate {

/// How large a graph's file may be, whose weights lie elsewhere.
inline constexpr std::size_t most_graph_bytes = std::size_t{64} << 20;

/// A tensor of the weight file: where its bytes lie, from the file's beginning.
struct Placed {
  Dtype dtype{};
  std::vector<std::int64_t> shape;
  std::int64_t offset{}, length{};
};
using Places = std::map<std::string, Placed, std::less<>>;

/// A bundle's directory and its manifest. Immutable. Nothing of it is in memory but the manifest.
class Bundle {
 public:
  /// Reads the manifest, checks every plan, and every file's presence, size and, with `check_digests`, SHA-256 (on as
  /// many threads as there are cores). Throws Error of Code::bundle or Code::plan with the first fault found.
  static Bundle open(const std::string& path, bool check_digests);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const Manifest& manifest() const { return manifest_; }
  /// A listed file whole, of the size and the SHA-256 that the manifest says. Throws Error of Code::bundle.
  [[nodiscard]] std::string read(std::string_view name, std::size_t most_bytes) const;
  /// Every name leads to the file that it led to when it was checked, and nobody has written to it since. Throws Error
  /// of Code::bundle.
  void check_unchanged(const std::vector<std::string>& names) const;
  /// Every tensor of the weight file; empty for a bundle without weights. Throws Error of Code::bundle.
  [[nodiscard]] Places places() const;

 private:
  std::string path_;
  Manifest manifest_;
  std::map<std::string, FileState, std::less<>> states_;
};

/// The places of a safetensors file, from its first bytes and its size. Throws Error of Code::bundle with `name` in it.
Places parse_places(std::string_view head, std::uint64_t file_bytes, const std::string& name);

/// See that an ONNX file is a graph as export writes them, or one that was `lowered` for CUDA, and the one that `spec`
/// describes: what Python's `tgate_engine.onnx_form.check_graph` lets through, and nothing else. Throws Error of
/// Code::bundle.
void check_graph(std::string_view data, const GraphSpec& spec, const std::string& weights_file, const Places& weights,
                 bool lowered = false);

/// What a graph that `check_graph` has let through reads of the weight file, and makes of it.
struct GraphWeights {
  std::vector<std::string> names;  ///< of its initializers that lie there
  bool half = false;               ///< some of them have 16 bits
  bool bfloat = false;             ///< some are of bfloat16
  bool resizes = false;            ///< it has a Resize
};
GraphWeights weights_of(std::string_view data);

}  // namespace tgate
