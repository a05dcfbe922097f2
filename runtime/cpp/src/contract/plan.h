// Graphs as the manifest describes them, and the program of one trajectory over them.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "contract/dtypes.h"
#include "contract/json.h"

namespace tgate {

class Reader;

/// How many pairs (latents, output) before the current one a step may read.
inline constexpr int history = 3;
/// Numbers of a step row: timestep, input scale, guidance scale, noise, 4 of latents, 4 of outputs.
inline constexpr int step_row_length = 12;
/// The largest guidance scale that anybody exports.
inline constexpr double most_guidance = 1e4;

enum class Role : std::uint8_t { denoise, text, image, decode, encode, preview };
std::string_view name_of(Role role);

/// One input or output of a graph. A dimension of -1 is the batch, and can only be the first.
struct TensorSpec {
  std::string name;
  Dtype dtype{};
  std::vector<std::int64_t> shape;

  bool operator==(const TensorSpec& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
  /// Elements, and bytes, for a batch of so many images; the largest int64 where it is more. The reader has seen that
  /// they are not for as many images as the graph takes.
  [[nodiscard]] std::int64_t elements(std::int64_t images) const;
  [[nodiscard]] std::int64_t bytes(std::int64_t images) const;
  /// Whether it has a row for each image.
  [[nodiscard]] bool by_image() const { return !shape.empty() && shape.front() < 0; }
};

/// Least and most images in a call.
struct Range {
  std::int64_t least{}, most{};
  bool operator==(const Range& other) const { return least == other.least && most == other.most; }
  bool operator<(const Range& other) const { return least != other.least ? least < other.least : most < other.most; }
};

struct GraphSpec {
  std::string file;
  Role role{};
  Range batch;
  std::vector<TensorSpec> inputs, outputs;
  std::int64_t macs_paper{}, macs_all{}, scratch_bytes{};

  bool operator==(const GraphSpec& other) const;
  [[nodiscard]] const TensorSpec* input(std::string_view name) const;
  [[nodiscard]] const TensorSpec* output(std::string_view name) const;
};

/// By the names that plans use, in the manifest's order.
using Graphs = std::vector<std::pair<std::string, GraphSpec>>;
const GraphSpec* find(const Graphs& graphs, std::string_view name);

/// One network call's coefficients.
struct SamplerStep {
  double timestep{}, input_scale{};
  std::array<double, history + 1> latents{}, outputs{};
  double noise{};

  /// How far back it reads: 0 for the current pair alone.
  [[nodiscard]] int lag() const;
};

struct Step {
  std::int64_t index{};
  std::string phase, graph;
  SamplerStep call;
  std::vector<std::string> reads, writes;  ///< carries
};

struct Plan {
  std::string name;
  double guidance_scale{};
  double initial_scale{};
  std::int64_t sampler_steps{}, lead_in{};
  std::string sampler, prediction_type;
  std::vector<std::string> baselines;
  std::vector<Step> steps;

  /// Whether some step draws noise.
  [[nodiscard]] bool stochastic() const;
  /// How many pairs before the current one some step reads.
  [[nodiscard]] int reach() const;
  /// The graphs that it runs, each once, in order of first use.
  [[nodiscard]] std::vector<std::string> graphs() const;
  /// Proves that the plan can run on the graphs of one shape, see PlanCheck. Throws Error of Code::plan.
  void check(const Graphs& graphs, const std::set<std::string>& carries) const;

  /// Reads what `tgate plan` writes. Throws Error of Code::plan.
  static Plan from_json(const json::Value& value);
  /// The same, where a reader stands. Throws Error of the reader's code.
  static Plan read(Reader& reader);
  /// The plan of a file that `tgate plan --output` wrote. Throws Error of Code::plan.
  static Plan load(const std::string& path);
};

/// Proves that plans can run on the graphs of one shape, as Python's `PlanCheck` does. Borrows the graphs.
class PlanCheck {
 public:
  PlanCheck(const Graphs& graphs, const std::set<std::string>& carries);
  PlanCheck(PlanCheck&&) noexcept;
  ~PlanCheck();

  /// Throws Error of Code::plan at the first fault.
  void operator()(const Plan& plan) const;

 private:
  struct Tables;
  std::unique_ptr<const Tables> tables_;
};

}  // namespace tgate
