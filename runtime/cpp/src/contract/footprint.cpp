// What a trajectory takes in memory: every buffer that a host allocates before the first step, and the totals.
#include <algorithm>
#include <limits>
#include <set>
#include <unordered_map>

#include "contract/manifest.h"

namespace tgate {
namespace {

/// Sums and products of bytes: the largest number there is where it is more, as no memory holds that either.
std::int64_t plus(std::int64_t a, std::int64_t b) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  return a > most - b ? most : a + b;
}

std::int64_t times(std::int64_t a, std::int64_t b) {
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  return b != 0 && a > most / b ? most : a * b;
}

bool is_kept(const TensorSpec& output, const std::vector<std::string>& writes) {
  return output.name == "next_latents" || output.name == "output" ||
         std::find(writes.begin(), writes.end(), output.name) != writes.end();
}

/// The steps of plans that differ in their graph or in what they write, in order.
std::vector<const Step*> different_steps(const std::vector<const Plan*>& plans) {
  std::set<std::pair<std::string_view, std::vector<std::string>>> seen;
  std::vector<const Step*> steps;
  for (const Plan* plan : plans) {
    for (const Step& step : plan->steps) {
      if (seen.emplace(step.graph, step.writes).second) steps.push_back(&step);
    }
  }
  return steps;
}

}  // namespace

std::vector<TensorSpec> buffers_of(const Graphs& graphs, const std::vector<const Plan*>& plans) {
  std::vector<TensorSpec> tensors;
  std::unordered_map<std::string, std::size_t> places;
  const auto put = [&](const TensorSpec& tensor) {
    const auto [place, is_new] = places.emplace(tensor.name, tensors.size());
    if (is_new) {
      tensors.push_back(tensor);
    } else {
      tensors[place->second] = tensor;
    }
  };
  for (const Step* step : different_steps(plans)) {
    const GraphSpec& graph = *find(graphs, step->graph);
    for (const TensorSpec& tensor : graph.inputs) put(tensor);
    for (const TensorSpec& tensor : graph.outputs) {
      if (is_kept(tensor, step->writes)) put(tensor);
    }
  }
  return tensors;
}

Memory memory_of(const Manifest& manifest, const Shape& shape, const Plan& plan, std::int64_t images) {
  Memory memory;
  if (!manifest.weights.empty()) memory.weights = manifest.files.at(manifest.weights).bytes;
  for (const TensorSpec& tensor : buffers_of(shape.graphs, {&plan})) {
    memory.request = plus(memory.request, tensor.bytes(images));
  }
  // What the graph at work holds besides, outputs that the step does not keep among it.
  for (const Step* step : different_steps({&plan})) {
    const GraphSpec& graph = *find(shape.graphs, step->graph);
    std::int64_t scratch = times(images, graph.scratch_bytes);
    for (const TensorSpec& tensor : graph.outputs) {
      if (!is_kept(tensor, step->writes)) scratch = plus(scratch, tensor.bytes(images));
    }
    memory.scratch = std::max(memory.scratch, scratch);
  }
  memory.peak = plus(memory.weights, plus(memory.request, memory.scratch));
  return memory;
}

}  // namespace tgate
