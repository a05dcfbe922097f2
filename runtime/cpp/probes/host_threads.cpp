// Many requests at once: host_threads BUNDLE LIBRARY THREADS
//
// Each of THREADS threads draws three requests one after the other, by itself or two at a time in a pool, opens sessions
// and bundles of its own beside the shared one, and has some of its requests cancelled by the main thread at odd moments.
// Whatever was not cancelled must be what one thread draws. Prints a line for each thread; ends in 1 where one differs.
// Run under sanitizers.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <tgate.hpp>

namespace {

tgate::RequestOptions ask_for(int number) {
  const char* const prompts[] = {"a red circle", "a small blue square above a green star", "a yellow ring", ""};
  const char* const plans[] = {"default", "ungated"};
  tgate::RequestOptions ask;
  ask.prompt = prompts[number % 4];
  ask.plan = plans[number % 2];
  ask.seed = static_cast<std::uint64_t>(number);
  return ask;
}

/// The request that the main thread may cancel.
class Target {
 public:
  void set(const tgate::Request* request) {
    const std::lock_guard<std::mutex> lock(guard_);
    request_ = request;
  }
  void cancel() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (request_ != nullptr) {
      request_->cancel();
    }
  }

 private:
  std::mutex guard_;
  const tgate::Request* request_ = nullptr;
};

struct Outcome {
  int drawn = 0, cancelled = 0, different = 0, failed = 0;
};

void work(const std::string& path, const tgate::SessionOptions& options, const tgate::Session& session,
          const std::vector<std::vector<float>>& wanted, Target& target, Outcome& outcome, int thread) {
  try {
    // Opened and closed beside requests of the others.
    const tgate::Bundle bundle(path);
    const tgate::Session own(bundle, options);
    const tgate::Session& used = thread % 2 == 0 ? session : own;
    for (int round = 0; round < 3; ++round) {
      const int number = thread % 4;
      const tgate::Pool pool(used, 2, {"default", "ungated"});
      tgate::RequestOptions ask = ask_for(number);
      ask.pool = &pool;
      tgate::Request first(used, ask);
      ask.seed += 100;
      tgate::Request second(used, ask);
      target.set(&first);
      bool stopped = false;
      for (int step = 0; step < 25 && !stopped; ++step) {
        if (round == 1) {
          stopped = tgate::batch({&first, &second})[0] != 0;
          continue;
        }
        second.step();
        try {
          first.step();
        } catch (const tgate::Failure& failure) {
          if (failure.code() != TGATE_CANCELLED) {
            throw;
          }
          stopped = true;
        }
      }
      target.set(nullptr);
      if (stopped) {
        ++outcome.cancelled;
        first.reset(ask_for(number));
        first.run();
      }
      const bool good = first.latents() == wanted[static_cast<std::size_t>(number)];
      ++(good ? outcome.drawn : outcome.different);
      if (first.decode().pixels.empty()) {
        ++outcome.different;
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "thread %d: %s\n", thread, error.what());
    ++outcome.failed;
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: host_threads BUNDLE LIBRARY THREADS\n");
    return 2;
  }
  const std::string path = words[1];
  const int threads = std::atoi(words[3]);
  tgate::SessionOptions options;
  options.library = words[2];
  options.threads = 1;
  options.plans = {"default", "ungated"};
  const tgate::Bundle bundle(path);
  const tgate::Session session(bundle, options);
  std::vector<std::vector<float>> wanted;
  for (int number = 0; number < 4; ++number) {
    tgate::Request request(session, ask_for(number));
    request.run();
    wanted.push_back(request.latents());
  }
  const auto all = static_cast<std::size_t>(threads);
  std::vector<Outcome> outcomes(all);
  std::vector<Target> targets(all);
  std::atomic<bool> over{false};
  std::vector<std::thread> workers;
  for (std::size_t i = 0; i < all; ++i) {
    workers.emplace_back([&, i] {
      work(path, options, session, wanted, targets[i], outcomes[i], static_cast<int>(i));
    });
  }
  std::thread canceller([&] {
    unsigned state = 1;
    while (!over) {
      state = state * 1664525U + 1013904223U;
      std::this_thread::sleep_for(std::chrono::milliseconds(20 + state % 64));
      targets[(state >> 16) % all].cancel();
    }
  });
  for (std::thread& worker : workers) {
    worker.join();
  }
  over = true;
  canceller.join();
  bool good = true;
  for (std::size_t i = 0; i < all; ++i) {
    const Outcome& each = outcomes[i];
    std::printf("%zu: %d drawn, %d of them after a cancel, %d different, %d failed\n", i, each.drawn, each.cancelled,
                each.different, each.failed);
    good = good && each.different == 0 && each.failed == 0 && each.drawn == 3;
  }
  return good ? 0 : 1;
}
