// What a bundle comes to, as lines of JSON:
//
//   probe-bundle open PATH [--no-digests]        whether it opens, and what was read
//   probe-bundle paths                           the same for each path on stdin, a line each, with digests
//   probe-bundle graphs                          for each path on stdin, whether it opens and its graphs are let through
//   probe-bundle tokenizers                      the same of its tokenizers
//   probe-bundle manifests PATH                  the same for each manifest on stdin, which is written into PATH and
//                                                opened without digests: its length in bytes, a line break, and itself
//   probe-bundle plan FILE                       whether a file is a plan, and what was read
//   probe-bundle memory PATH PLAN SIZE IMAGES    memory_of
//   probe-bundle buffers PATH SIZE PLAN...       buffers_of
//   probe-bundle signatures PATH                 check_signatures and check_forms of every shape, check_ranges of every size
//
// A refusal is {"code": ..., "text": ...}, with the code's name as in tgate.h.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <set>
#include <string>
#include <vector>

#include "contract/bundle.h"
#include "contract/error.h"
#include "contract/json.h"
#include "tokenizer/tokenizer.h"

namespace {

using tgate::json::Array;
using tgate::json::Object;
using tgate::json::Value;

constexpr std::size_t most_read = 64u << 20;

template <class T>
Value value(T held) {
  Value made;
  made.held.emplace<T>(std::move(held));
  return made;
}
Value text(std::string_view words) { return value(std::string(words)); }

template <class List, class Make>
Value list(const List& things, Make make) {
  Array array;
  for (const auto& thing : things) array.push_back(make(thing));
  return value(std::move(array));
}
Value words(const std::vector<std::string>& names) { return list(names, text); }
Value wholes(const std::vector<std::int64_t>& numbers) { return list(numbers, value<std::int64_t>); }

/// Pairs of names and things as an object.
template <class Table, class Make>
Value table(const Table& things, Make make) {
  Object object;
  for (const auto& [name, thing] : things) object.emplace_back(name, make(thing));
  return value(std::move(object));
}

Value of_range(const tgate::Range& range) { return wholes({range.least, range.most}); }

Value of_tensor(const tgate::TensorSpec& tensor) {
  return value(Array{text(tensor.name), text(tgate::facts_of(tensor.dtype).name), wholes(tensor.shape)});
}

Value of_graph(const tgate::GraphSpec& graph) {
  return value(Object{{"file", text(graph.file)},
                      {"role", text(tgate::name_of(graph.role))},
                      {"batch", of_range(graph.batch)},
                      {"inputs", list(graph.inputs, of_tensor)},
                      {"outputs", list(graph.outputs, of_tensor)},
                      {"macs", wholes({graph.macs_paper, graph.macs_all})},
                      {"scratch_bytes", value(graph.scratch_bytes)}});
}

Value of_shape(const tgate::Shape& shape) {
  const auto row = [](const std::vector<float>& numbers) {
    return list(numbers, [](float number) { return value(double{number}); });
  };
  return value(Object{{"size", text(shape.size())},
                      {"batch", of_range(shape.batch)},
                      {"latents", wholes(shape.latents)},
                      {"constants", table(shape.constants, row)},
                      {"graphs", table(shape.graphs, of_graph)}});
}

Value of_step(const tgate::Step& step) {
  Array numbers{value(step.call.timestep), value(step.call.input_scale), value(step.call.noise)};
  for (const double number : step.call.latents) numbers.push_back(value(number));
  for (const double number : step.call.outputs) numbers.push_back(value(number));
  return value(Object{{"phase", text(step.phase)},
                      {"graph", text(step.graph)},
                      {"numbers", value(std::move(numbers))},
                      {"reads", words(step.reads)},
                      {"writes", words(step.writes)}});
}

Value of_plan(const tgate::Plan& plan) {
  return value(Object{{"name", text(plan.name)},
                      {"guidance_scale", value(plan.guidance_scale)},
                      {"initial_scale", value(plan.initial_scale)},
                      {"sampler_steps", value(plan.sampler_steps)},
                      {"lead_in", value(plan.lead_in)},
                      {"sampler", text(plan.sampler)},
                      {"prediction_type", text(plan.prediction_type)},
                      {"baselines", words(plan.baselines)},
                      {"stochastic", value(plan.stochastic())},
                      {"reach", value(std::int64_t{plan.reach()})},
                      {"graphs", words(plan.graphs())},
                      {"steps", list(plan.steps, of_step)}});
}

Value of_golden(const tgate::Golden& golden) {
  return value(Object{{"file", text(golden.file)},
                      {"size", text(golden.size)},
                      {"graph", text(golden.graph)},
                      {"tolerance", value(golden.tolerance)},
                      {"oracle", text(golden.oracle)},
                      {"plan", golden.plan ? of_plan(*golden.plan) : Value{}}});
}

Value of_manifest(const tgate::Manifest& m) {
  const auto conditioning = [](const tgate::Conditioning& tensor) {
    constexpr std::string_view sources[] = {"text", "image", "constant"}, negatives[] = {"own", "same", "zeros"};
    return value(Array{text(tensor.name), text(sources[static_cast<std::size_t>(tensor.source)]),
                       text(negatives[static_cast<std::size_t>(tensor.negative)])});
  };
  const auto tokenizer = [](const tgate::TokenizerSpec& spec) {
    return value(Array{text(spec.file), text(spec.input), value(spec.length), value(spec.pad_id)});
  };
  const auto file = [](const tgate::FileDigest& digest) {
    return value(Array{text(digest.sha256), value(digest.bytes)});
  };
  constexpr std::string_view guidances[] = {"classifier-free", "embedded", "none"};
  return value(Object{{"model", text(m.model)},
                      {"family", text(m.family)},
                      {"licence", text(m.licence)},
                      {"weights", text(m.weights)},
                      {"samplers", text(m.samplers)},
                      {"dtype", text(tgate::facts_of(m.dtype).name)},
                      {"frames", value(m.frames)},
                      {"fps", value(m.fps)},
                      {"guidance", text(guidances[static_cast<std::size_t>(m.guidance)])},
                      {"guidance_scale", value(m.guidance_scale)},
                      {"zero_negative", value(m.zero_negative)},
                      {"shapes", list(m.shapes, of_shape)},
                      {"carries", list(m.carries, text)},
                      {"conditioning", list(m.conditioning, conditioning)},
                      {"tokenizers", list(m.tokenizers, tokenizer)},
                      {"plans", table(m.plans, of_plan)},
                      {"plan_order", list(m.plans, [](const auto& plan) { return text(plan.first); })},
                      {"goldens", table(m.goldens, of_golden)},
                      {"files", table(m.files, file)},
                      {"sizes", words(m.sizes())}});
}

const char* name_of(tgate::Code code) {
  constexpr const char* names[] = {"",       "argument", "bundle",    "plan",    "engine",
                                   "request", "memory",   "cancelled", "internal"};
  return names[static_cast<std::size_t>(code)];
}

/// A line with what `make` gives, or with the refusal.
template <class Make>
void answer(Make make) {
  Value told;
  try {
    told.held.emplace<Object>(Object{{"ok", make()}});
  } catch (const tgate::Error& error) {
    told.held.emplace<Object>(Object{{"code", text(name_of(error.code()))}, {"text", text(error.what())}});
  }
  std::cout << tgate::json::canonical(told) << '\n';
}

void answer_bundle(const std::string& path, bool digests) {
  answer([&] { return of_manifest(tgate::Bundle::open(path, digests).manifest()); });
}

void answer_graphs(const std::string& path) {
  answer([&] {
    const tgate::Bundle bundle = tgate::Bundle::open(path, true);
    const tgate::Manifest& manifest = bundle.manifest();
    const tgate::Places places = bundle.places();
    for (const tgate::Shape& shape : manifest.shapes) {
      for (const auto& [name, spec] : shape.graphs) {
        tgate::check_graph(bundle.read(spec.file, most_read), spec, manifest.weights, places);
      }
    }
    return Value{};
  });
}

void answer_tokenizers(const std::string& path) {
  answer([&] {
    const tgate::Bundle bundle = tgate::Bundle::open(path, true);
    for (const tgate::TokenizerSpec& spec : bundle.manifest().tokenizers) {
      tgate::Tokenizer::parse(bundle.read(spec.file, most_read), spec.length, spec.pad_id, spec.file);
    }
    return Value{};
  });
}

void answer_manifests(const std::string& path) {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::string manifest(std::stoul(line), '\0');
    std::cin.read(manifest.data(), static_cast<std::streamsize>(manifest.size()));
    std::ofstream(path + "/manifest.json", std::ios::binary | std::ios::trunc) << manifest;
    answer_bundle(path, false);
  }
}

std::vector<const tgate::Plan*> plans_of(const tgate::Manifest& manifest, const std::vector<std::string>& names) {
  std::vector<const tgate::Plan*> plans;
  for (const std::string& name : names) plans.push_back(&manifest.plan(name));
  return plans;
}

void answer_memory(const std::string& path, const std::string& plan, const std::string& size, std::int64_t images) {
  answer([&] {
    const tgate::Bundle bundle = tgate::Bundle::open(path, false);
    const tgate::Manifest& manifest = bundle.manifest();
    const tgate::Memory memory =
        tgate::memory_of(manifest, *manifest.shapes_of(size).front(), manifest.plan(plan), images);
    return value(Object{{"weights", value(memory.weights)},
                        {"request", value(memory.request)},
                        {"scratch", value(memory.scratch)},
                        {"peak", value(memory.peak)}});
  });
}

void answer_buffers(const std::string& path, const std::string& size, const std::vector<std::string>& plans) {
  answer([&] {
    const tgate::Bundle bundle = tgate::Bundle::open(path, false);
    const tgate::Manifest& manifest = bundle.manifest();
    const tgate::Graphs& graphs = manifest.shapes_of(size).front()->graphs;
    return list(tgate::buffers_of(graphs, plans_of(manifest, plans)), of_tensor);
  });
}

void answer_signatures(const std::string& path) {
  answer([&] {
    const tgate::Bundle bundle = tgate::Bundle::open(path, false);
    for (const tgate::Shape& shape : bundle.manifest().shapes) {
      std::vector<std::pair<std::string, const tgate::GraphSpec*>> kept;
      for (const auto& [name, spec] : shape.graphs) kept.emplace_back(name, &spec);
      tgate::check_signatures(bundle.manifest(), kept);
      tgate::check_forms(shape, kept);
    }
    std::set<std::string> used;
    for (const auto& [name, plan] : bundle.manifest().plans) {
      for (const std::string& graph : plan.graphs()) used.insert(graph);
    }
    for (const std::string& size : bundle.manifest().sizes()) tgate::check_ranges(bundle.manifest().shapes_of(size), used);
    return Value{};
  });
}

}  // namespace

int main(int count, char** arguments) {
  std::ios::sync_with_stdio(false);
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const std::string command = words.empty() ? "" : words[0];
  const std::size_t given = words.size();
  if (command == "open" && given >= 2) {
    answer_bundle(words[1], given < 3 || words[2] != "--no-digests");
  } else if (command == "paths") {
    for (std::string path; std::getline(std::cin, path);) answer_bundle(path, true);
  } else if (command == "graphs") {
    for (std::string path; std::getline(std::cin, path);) answer_graphs(path);
  } else if (command == "tokenizers") {
    for (std::string path; std::getline(std::cin, path);) answer_tokenizers(path);
  } else if (command == "manifests" && given == 2) {
    answer_manifests(words[1]);
  } else if (command == "plan" && given == 2) {
    answer([&] { return of_plan(tgate::Plan::load(words[1])); });
  } else if (command == "memory" && given == 5) {
    answer_memory(words[1], words[2], words[3], std::stoll(words[4]));
  } else if (command == "buffers" && given >= 3) {
    answer_buffers(words[1], words[2], {words.begin() + 3, words.end()});
  } else if (command == "signatures" && given == 2) {
    answer_signatures(words[1]);
  } else {
    std::fputs("see the top of probes/bundle.cpp\n", stderr);
    return 2;
  }
}
