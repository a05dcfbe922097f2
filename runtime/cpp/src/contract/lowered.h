// What `tgate build BUNDLE --engine ort-cuda` leaves in a bundle's folder: its graphs, lowered for CUDA's kernels.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "contract/bundle.h"

namespace tgate {

/// A tensor of the weight file, by its name there: its dimensions in another order, or as they are where there is none
/// and its numbers in that dtype, which is its own or float32.
struct Laid {
  std::string source;
  std::vector<std::int64_t> order;
  Dtype dtype{};
  bool operator==(const Laid& other) const {
    return source == other.source && order == other.order && dtype == other.dtype;
  }
};
using LaidWeights = std::map<std::string, Laid, std::less<>>;

/// The dtype and shape that a laid tensor has, and a place for it beyond the end of every weight file: nobody finds it
/// there. Throws Error of Code::bundle where `laid` is no way to lay a tensor of `places`.
Placed place_of(const Laid& laid, const Places& places);

/// The bytes of `laid`, made from those of its source, into `to`, which has room for place_of(laid, places).length.
void lay(const Laid& laid, const Placed& source, const std::byte* from, std::byte* to);

/// A graph for ONNX Runtime's CUDA provider, checked, with all or some of its outputs: what only the others need is not in
/// it. `weights`: what it reads that is laid otherwise than in the weight file, by its name in the graph.
struct LoweredGraph {
  GraphSpec spec;
  std::string data;
  LaidWeights weights;
};

/// The lowered graphs that lie in a bundle's folder. Immutable.
class LoweredGraphs {
 public:
  /// Reads what there is; nothing where nobody has built it. Throws Error of Code::bundle where it is damaged, or of
  /// another version than this library takes.
  static std::optional<LoweredGraphs> open(const Bundle& bundle);

  /// The graph of `spec`, lowered: first with all of its outputs, then with those alone that steps want. Nothing where it
  /// was not built with the others. Throws Error of Code::bundle where it was made from another graph than the manifest
  /// lists, is damaged, or is no graph of `spec`'s.
  [[nodiscard]] std::vector<LoweredGraph> find(const Bundle& bundle, const GraphSpec& spec, const Places& places) const;

 private:
  struct Variant {
    std::vector<std::string> outputs;
    std::string digest;
    LaidWeights weights;
  };
  struct Entry {
    std::string source;  // its digest
    std::vector<Variant> variants;
  };
  static LoweredGraph read(const Bundle& bundle, const GraphSpec& spec, const Variant& variant, const Places& places);
  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace tgate
