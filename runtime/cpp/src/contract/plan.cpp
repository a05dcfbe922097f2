// A plan: read from JSON, and looked at.
#include "contract/plan.h"

#include <algorithm>
#include <unordered_set>

#include "contract/plain_files.h"
#include "contract/reader.h"

namespace tgate {
namespace {

constexpr std::size_t most_bytes = 8u << 20;  // of a file: room for the most calls there are, over 140 carries
constexpr std::int64_t most_steps = 1000;
constexpr std::int64_t most_lead_in = 1;  // calls before the first step; PNDM makes one
constexpr std::int64_t most_calls = most_steps + most_lead_in;
constexpr char again[] = "make the plan again with `tgate plan`";

std::array<double, history + 1> coefficients(Reader& step, std::string_view key) {
  const std::vector<double> values = step.numbers(key);
  std::array<double, history + 1> kept{};
  if (values.size() != kept.size()) {
    step.fail("." + std::string(key), "expected " + std::to_string(kept.size()) + " coefficients, got " +
                                          std::to_string(values.size()));
  }
  std::copy(values.begin(), values.end(), kept.begin());
  return kept;
}

Step read_step(Reader& r) {
  Step step;
  step.index = r.whole("index");
  step.phase = r.word("phase");
  step.graph = r.word("graph");
  step.call.timestep = r.number("timestep");
  step.call.input_scale = r.number("input_scale");
  step.call.latents = coefficients(r, "latents");
  step.call.outputs = coefficients(r, "outputs");
  step.call.noise = r.number("noise");
  step.reads = r.words("reads");
  step.writes = r.words("writes");
  return step;
}

void read_sampler(Reader& r, Plan& plan) {
  plan.sampler = r.word("name");
  plan.sampler_steps = r.whole("steps", 1, most_steps);
  plan.initial_scale = r.number("initial_scale");
  if (plan.initial_scale <= 0) r.fail(".initial_scale", "expected above 0, got " + json::repr(plan.initial_scale));
  plan.lead_in = r.whole("lead_in", 0, most_lead_in);
  plan.prediction_type = r.word("prediction_type");
  r.facts("options");
}

}  // namespace

int SamplerStep::lag() const {
  for (int j = history; j > 0; --j) {
    const auto i = static_cast<std::size_t>(j);
    if (latents[i] != 0 || outputs[i] != 0) return j;
  }
  return 0;
}

bool Plan::stochastic() const {
  return std::any_of(steps.begin(), steps.end(), [](const Step& step) { return step.call.noise != 0; });
}

int Plan::reach() const {
  int most = 0;
  for (const Step& step : steps) most = std::max(most, step.call.lag());
  return most;
}

std::vector<std::string> Plan::graphs() const {
  std::vector<std::string> names;
  std::unordered_set<std::string_view> seen;
  for (const Step& step : steps) {
    if (seen.insert(step.graph).second) names.push_back(step.graph);
  }
  return names;
}

Plan Plan::read(Reader& r) {
  Plan plan;
  plan.name = r.word("name");
  r.facts("settings");
  plan.baselines = r.words("baselines");
  plan.guidance_scale = r.number("guidance_scale", 0, most_guidance);
  Reader::all_of(r.inner("sampler"), [&](Reader& inner) {
    read_sampler(inner, plan);
    return 0;
  });
  plan.steps = r.items("steps", read_step, most_calls);
  const auto calls = static_cast<std::int64_t>(plan.steps.size());
  if (calls != plan.sampler_steps + plan.lead_in) {
    r.fail(".steps", "a sampler of " + std::to_string(plan.sampler_steps) + " steps and " +
                         std::to_string(plan.lead_in) + " lead-in calls needs as many, got " + std::to_string(calls));
  }
  for (std::size_t i = 0; i < plan.steps.size() && i < history; ++i) {
    const int lag = plan.steps[i].call.lag();
    if (lag > static_cast<int>(i)) {
      r.fail(".steps[" + std::to_string(i) + "]", "it reads " + std::to_string(lag) + " pairs back, but only " +
                                                      std::to_string(i) + " exist before it");
    }
  }
  return plan;
}

Plan Plan::from_json(const json::Value& value) {
  return Reader::all_of(Reader(value, "plan", Code::plan, again), read);
}

Plan Plan::load(const std::string& path) {
  const std::string file = shown(path, 1000);
  try {
    const json::Value value = json::parse(PlainFile::open(path).read(most_bytes));
    return Reader::all_of(Reader(value, file, Code::plan, again), read);
  } catch (const NotThere&) {
    throw Error(Code::plan, file + ": there is no such plan file; write one with `tgate plan`");
  } catch (const FileError& error) {
    throw Error(Code::plan, file + " is not a plan file (" + error.what() + "); write one with `tgate plan`");
  } catch (const json::ParseError& error) {
    throw Error(Code::plan, file + " is not a plan file (" + error.what() + "); write one with `tgate plan`");
  }
}

}  // namespace tgate
