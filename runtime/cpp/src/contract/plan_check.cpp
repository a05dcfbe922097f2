// The proof that a plan can run, before anything does.
#include <algorithm>
#include <unordered_map>

#include "contract/error.h"
#include "contract/plan.h"

namespace tgate {
namespace {

using Names = std::vector<std::string_view>;

/// Carries among a graph's inputs or outputs, by name.
using Carried = std::unordered_map<std::string_view, const TensorSpec*>;

constexpr char again[] = ". Make the plan again with `tgate plan`.";

[[noreturn]] void fail(const std::string& text) { throw Error(Code::plan, text); }

std::string joined(const Names& names) {
  std::string text;
  for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + shown(name);
  return text;
}

std::string some(Names names) {
  if (names.empty()) return "nothing";
  std::sort(names.begin(), names.end());
  if (names.size() <= 4) return joined(names);
  return joined({names[0], names[1]}) + " … " + shown(names.back()) + " (" + std::to_string(names.size()) + " in all)";
}

template <class Map>
Names keys_of(const Map& map) {
  Names names;
  for (const auto& entry : map) names.push_back(entry.first);
  return names;
}

/// What is in one of them alone.
std::string differing(Names a, Names b) {
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
  Names odd;
  std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(odd));
  return some(odd);
}

Names names_of(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

std::string form_of(const TensorSpec& tensor) {
  std::string text(facts_of(tensor.dtype).name);
  char before = '[';
  for (const std::int64_t dim : tensor.shape) {
    text += before + (dim < 0 ? std::string("batch") : std::to_string(dim));
    before = ',';
  }
  return text + (tensor.shape.empty() ? "[]" : "]");
}

bool same_form(const TensorSpec& a, const TensorSpec& b) { return a.dtype == b.dtype && a.shape == b.shape; }

}  // namespace

/// What is asked of every step, looked up once for all plans.
struct PlanCheck::Tables {
  struct Graph {
    Carried takes, gives;
  };
  std::unordered_map<std::string_view, Graph> denoisers;
  Names names;  ///< of the denoisers, in the bundle's order

  Tables(const Graphs& graphs, const std::set<std::string>& carries) {
    const auto carried = [&](const std::vector<TensorSpec>& tensors) {
      Carried found;
      for (const TensorSpec& tensor : tensors) {
        if (carries.count(tensor.name)) found.emplace(tensor.name, &tensor);
      }
      return found;
    };
    for (const auto& [name, spec] : graphs) {
      if (spec.role != Role::denoise) continue;
      denoisers.emplace(name, Graph{carried(spec.inputs), carried(spec.outputs)});
      names.push_back(name);
    }
  }
};

PlanCheck::PlanCheck(const Graphs& graphs, const std::set<std::string>& carries)
    : tables_(std::make_unique<const Tables>(graphs, carries)) {}
PlanCheck::PlanCheck(PlanCheck&&) noexcept = default;
PlanCheck::~PlanCheck() = default;

void PlanCheck::operator()(const Plan& plan) const {
  const auto where = [&](std::size_t i) { return "plan '" + shown(plan.name) + "', step " + std::to_string(i); };
  if (plan.steps.empty()) fail("plan '" + shown(plan.name) + "' has no steps, and one at least is wanted" + again);
  Carried written;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (step.index != static_cast<std::int64_t>(i)) {
      fail(where(i) + ": expected index " + std::to_string(i) + ", got " + std::to_string(step.index) + again);
    }
    const auto found = tables_->denoisers.find(step.graph);
    if (found == tables_->denoisers.end()) {
      fail(where(i) + " runs graph '" + shown(step.graph) + "'; the bundle has " + joined(tables_->names) +
           ". Export the bundle again.");
    }
    const Tables::Graph& graph = found->second;
    for (const std::string& name : step.reads) {
      if (!written.count(name)) {
        fail(where(i) + " reads " + shown(name) + ", which no earlier step writes; the steps before it write " +
             some(keys_of(written)) + again);
      }
    }
    const bool all = graph.takes.size() == step.reads.size() &&
                     std::all_of(step.reads.begin(), step.reads.end(),
                                 [&](const std::string& name) { return graph.takes.count(name) > 0; });
    if (!all) {
      fail(where(i) + ": graph '" + shown(step.graph) + "' reads " + some(keys_of(graph.takes)) +
           ", the plan differs in " + differing(names_of(step.reads), keys_of(graph.takes)));
    }
    for (const std::string& name : step.reads) {
      const TensorSpec &taken = *graph.takes.at(name), &there = *written.at(name);
      if (!same_form(taken, there)) {
        fail(where(i) + " reads " + shown(name) + " as " + form_of(taken) + ", but it was written as " +
             form_of(there));
      }
    }
    for (const std::string& name : step.writes) {
      const auto given = graph.gives.find(name);
      if (given == graph.gives.end()) {
        fail(where(i) + " writes " + shown(name) + ", which graph '" + shown(step.graph) + "' does not give");
      }
      written[name] = given->second;
    }
  }
  // Backwards: a step writes what its graph gives and a later step reads before it is written again.
  std::unordered_map<std::string_view, bool> live;
  for (std::size_t i = plan.steps.size(); i-- > 0;) {
    const Step& step = plan.steps[i];
    Names proper;
    for (const auto& given : tables_->denoisers.at(step.graph).gives) {
      const auto read = live.find(given.first);
      if (read != live.end() && read->second) proper.push_back(given.first);
    }
    const auto is_live = [&](const std::string& name) {
      const auto read = live.find(name);
      return read != live.end() && read->second;
    };
    if (proper.size() != step.writes.size() || !std::all_of(step.writes.begin(), step.writes.end(), is_live)) {
      fail(where(i) + ": a step writes the carries of its graph that a later step reads, no others; the plan differs " +
           "in " + differing(names_of(step.writes), proper) + again);
    }
    for (const std::string& name : step.writes) live[name] = false;
    for (const std::string& name : step.reads) live[name] = true;
  }
}

void Plan::check(const Graphs& graphs, const std::set<std::string>& carries) const {
  PlanCheck(graphs, carries)(*this);
}

}  // namespace tgate
