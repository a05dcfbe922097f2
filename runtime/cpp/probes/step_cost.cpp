// What a step costs outside the engine: step_cost BUNDLE LIBRARY PLAN IMAGES ROUNDS
//
// Walks the plan ROUNDS times and prints JSON: of all steps after the first walk, the time outside the engine's call in
// nanoseconds (median, 90 and 99 of a hundred) and inside it, and how many times the host allocated memory (malloc and
// its kin, this thread, outside the engine).
#include <dlfcn.h>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "run/request.h"

namespace {

thread_local bool counting = false;
thread_local std::size_t allocations = 0;
thread_local std::int64_t inside = 0;  // ticks

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// A clock that costs next to nothing even where nothing is in any cache, as after a call of the engine: asking the
/// system's twice around it took more than a microsecond of what is measured here.
std::int64_t ticks() {
#if defined(__x86_64__)
  return static_cast<std::int64_t>(__rdtsc());
#else
  return now_ns();
#endif
}

/// The engine, watched: what passes through its calls is not the host's.
class WatchedCall final : public tgate::Call {
 public:
  explicit WatchedCall(std::unique_ptr<tgate::Call> call) : call_(std::move(call)) {}
  void run(tgate::Interrupt& interrupt) override {
    const bool before = counting;
    counting = false;
    const std::int64_t begin = ticks();
    call_->run(interrupt);
    inside += ticks() - begin;
    counting = before;
  }

 private:
  std::unique_ptr<tgate::Call> call_;
};

class WatchedGraph final : public tgate::LoadedGraph {
 public:
  explicit WatchedGraph(std::shared_ptr<const tgate::LoadedGraph> graph) : graph_(std::move(graph)) {}
  [[nodiscard]] std::unique_ptr<tgate::Call> bind(const std::vector<tgate::Bound>& inputs,
                                                  const std::vector<tgate::Bound>& outputs,
                                                  std::int64_t images) const override {
    return std::make_unique<WatchedCall>(graph_->bind(inputs, outputs, images));
  }

 private:
  std::shared_ptr<const tgate::LoadedGraph> graph_;
};

class WatchedEngine final : public tgate::Engine {
 public:
  explicit WatchedEngine(std::shared_ptr<const tgate::Engine> engine) : engine_(std::move(engine)) {}
  [[nodiscard]] const std::string& title() const noexcept override { return engine_->title(); }
  [[nodiscard]] tgate::Loaded load(const tgate::Bundle& bundle,
                                   const std::vector<const tgate::GraphSpec*>& graphs,
                                   std::shared_ptr<const tgate::Instead> instead) const override {
    tgate::Loaded loaded = engine_->load(bundle, graphs, std::move(instead));
    for (auto& graph : loaded.graphs) {
      graph = std::make_shared<WatchedGraph>(graph);
    }
    return loaded;
  }
  [[nodiscard]] std::unique_ptr<tgate::Interrupt> interrupt() const override { return engine_->interrupt(); }
  [[nodiscard]] tgate::DeviceMemory allocate(std::size_t bytes) const override { return engine_->allocate(bytes); }
  void upload(std::byte* to, const void* from, std::size_t bytes) const override { engine_->upload(to, from, bytes); }
  void download(void* to, const std::byte* from, std::size_t bytes) const override { engine_->download(to, from, bytes); }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) const override { engine_->copy(to, from, bytes); }
  void swap(std::byte* one, std::byte* other, std::size_t bytes) const override { engine_->swap(one, other, bytes); }

 private:
  std::shared_ptr<const tgate::Engine> engine_;
};

std::int64_t at(const std::vector<std::int64_t>& sorted, double part) {
  return sorted[static_cast<std::size_t>(part * static_cast<double>(sorted.size() - 1))];
}

}  // namespace

// Every allocation of this program goes through here; those of the engine are not counted.
extern "C" void* malloc(std::size_t size) {
  using Malloc = void* (*)(std::size_t);
  static const auto next = reinterpret_cast<Malloc>(dlsym(RTLD_NEXT, "malloc"));
  allocations += counting ? 1 : 0;
  return next(size);
}

int main(int count, char** words) try {
  if (count != 6) {
    std::fprintf(stderr, "usage: step_cost BUNDLE LIBRARY PLAN IMAGES ROUNDS\n");
    return 2;
  }
  tgate::SessionOptions options;
  options.engine.library = words[2];
  options.engine.threads = 1;
  options.plans = {words[3]};
  const auto bundle = std::make_shared<const tgate::Bundle>(tgate::Bundle::open(words[1], true));
  const auto session =
      tgate::Session::open(bundle, options, std::make_shared<WatchedEngine>(tgate::Engine::open(options.engine)));
  tgate::Ask ask;
  ask.plan = words[3];
  ask.images = static_cast<std::size_t>(std::atoi(words[4]));
  ask.prompt = "a red circle above a blue square";
  tgate::Request request(session, nullptr, ask);
  std::vector<std::int64_t> outside, within;
  const std::int64_t first_ns = now_ns(), first_ticks = ticks();
  std::size_t allocated = 0;
  const int rounds = std::atoi(words[5]);
  for (int round = 0; round < rounds; ++round) {
    request.reset(ask);
    while (!request.done()) {
      inside = 0;
      allocations = 0;
      const bool last = request.position() + 1 == request.program().moves.size();
      counting = true;
      const std::int64_t begin = ticks();
      request.step();
      const std::int64_t whole = ticks() - begin;
      counting = false;
      if (round > 0 && !last) {  // after the last step, latents are looked at
        outside.push_back(whole - inside);
        within.push_back(inside);
        allocated += allocations;
      }
    }
  }
  std::sort(outside.begin(), outside.end());
  std::sort(within.begin(), within.end());
  const double tick_ns = static_cast<double>(now_ns() - first_ns) / static_cast<double>(ticks() - first_ticks);
  const auto ns = [&](const std::vector<std::int64_t>& sorted, double part) {
    return static_cast<long long>(static_cast<double>(at(sorted, part)) * tick_ns);
  };
  std::printf("{\"steps\": %zu, \"outside_ns\": {\"median\": %lld, \"p90\": %lld, \"p99\": %lld}, \"inside_ns_median\": %lld, "
              "\"allocations\": %zu}\n",
              outside.size(), ns(outside, 0.5), ns(outside, 0.9), ns(outside, 0.99), ns(within, 0.5), allocated);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
