// Calls in any order: host_sequences BUNDLE LIBRARY SEED SEQUENCES THREADS
//
// Each of THREADS threads makes up sequences of calls over pools and requests of one session: requests of several
// images that join, step alone or together, stop, begin anew and go in any order, callbacks that call the library, and
// arguments that are wrong. A model of each request says which code a call must end in. Whatever an image is after each
// of its steps must be what it is when it is drawn alone, bit for bit. Where there is more than one thread, the main
// thread cancels requests of all of them at odd moments. Ends in 1, and says which sequence, where something differs.
// Run under sanitizers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <tgate.hpp>

namespace {

constexpr const char* prompts[] = {"a red circle", "a small blue square above", "", "large"};
constexpr double scales[] = {0, 2.5, 4};
constexpr std::uint64_t seeds = 6;

[[noreturn]] void fault(const std::string& text) { throw std::runtime_error(text); }

/// What one image is drawn of.
struct Drawn {
  std::string plan;
  std::size_t prompt = 0, scale = 0;
  std::uint64_t seed = 0;
  bool operator<(const Drawn& other) const {
    return std::tie(plan, prompt, scale, seed) < std::tie(other.plan, other.prompt, other.scale, other.seed);
  }
};

/// Latents after each step, drawn by itself.
using Trajectory = std::vector<std::vector<float>>;

class World {
 public:
  World(const std::string& path, const std::string& library) : bundle_(path) {
    tgate::SessionOptions options;
    options.library = library;
    options.threads = 1;
    session_ = std::make_unique<tgate::Session>(bundle_, options);
    plans = bundle_.plans();
  }
  [[nodiscard]] const tgate::Session& session() const { return *session_; }

  [[nodiscard]] const Trajectory& alone(const Drawn& drawn) {
    const std::lock_guard<std::mutex> lock(guard_);
    Trajectory& found = trajectories_[drawn];
    if (found.empty()) {
      tgate::RequestOptions ask;
      ask.plan = drawn.plan;
      ask.prompt = prompts[drawn.prompt];
      ask.guidance_scale = scales[drawn.scale];
      ask.seed = drawn.seed;
      tgate::Request request(*session_, ask);
      found.push_back(request.latents());
      while (request.progress().graph != nullptr) {
        request.step();
        found.push_back(request.latents());
      }
    }
    return found;
  }

  std::vector<std::string> plans;

 private:
  tgate::Bundle bundle_;
  std::unique_ptr<tgate::Session> session_;
  std::mutex guard_;
  std::map<Drawn, Trajectory> trajectories_;
};

/// A request, and what it must be like.
struct Live {
  tgate_request* handle = nullptr;
  tgate_pool* pool = nullptr;  // null: its own
  Drawn first;                 // of image 0; image j has the seed + j
  std::size_t images = 1, done = 0, total = 0;
  std::atomic<bool> cancelled{false};
  bool stops = false;    // its callback says so next
  bool cancels = false;  // its callback cancels it
  std::size_t decodes = 0;  // its callback decodes a picture of so many bytes
  bool called = false;
};

struct Pooled {
  tgate_pool* handle = nullptr;
  std::size_t images = 0;
  std::vector<std::string> plans;
};

/// What the main thread may cancel: requests that are there.
class Targets {
 public:
  void add(Live* live) { with([&] { all_.push_back(live); }); }
  void remove(Live* live) { with([&] { all_.erase(std::find(all_.begin(), all_.end(), live)); }); }
  void cancel(std::uint32_t odd) {
    with([&] {
      if (!all_.empty()) {
        Live& live = *all_[odd % all_.size()];
        live.cancelled = true;  // first, so that whoever sees the effect sees the reason
        tgate_request_cancel(live.handle);
      }
    });
  }
  template <class Work>
  void with(Work work) {
    const std::lock_guard<std::mutex> lock(guard_);
    work();
  }

 private:
  std::mutex guard_;
  std::vector<Live*> all_;
};

/// One sequence of calls.
class Sequence {
 public:
  Sequence(World& world, Targets& targets, std::uint32_t seed, bool disturbed)
      : world_(world), targets_(targets), random_(seed), disturbed_(disturbed) {}
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence() {
    while (!requests_.empty()) {
      drop(0);
    }
    for (const auto& pool : pools_) {
      tgate_pool_free(pool->handle);
    }
  }

  std::size_t run() {
    const std::size_t calls = 20 + below(100);
    for (std::size_t i = 0; i < calls; ++i) {
      const std::size_t kind = below(100);
      if (kind < 4 || pools_.empty()) {
        make_pool();
      } else if (kind < 20 || requests_.empty()) {
        make_request();
      } else if (kind < 55) {
        share();
      } else if (kind < 62) {
        step(any(), false);
      } else if (kind < 65) {
        step(any(), true);
      } else if (kind < 70) {
        reset();
      } else if (kind < 73) {
        stop();
      } else if (kind < 82) {
        drop(below(requests_.size()));
      } else if (kind < 83) {
        drop_pool();
      } else if (kind < 90) {
        refused();
      } else {
        decode();
      }
      for (const auto& live : requests_) {
        check(*live);
      }
      check_room();
    }
    return calls;
  }

  std::size_t compared = 0;

 private:
  std::size_t below(std::size_t limit) { return static_cast<std::size_t>(random_()) % limit; }
  Live& any() { return *requests_[below(requests_.size())]; }

  /// `error` by reference, as the call that puts it there is often an argument beside it.
  void expect(tgate_code got, tgate_code wanted, tgate_error*& error, const char* what) {
    const std::string text = tgate_error_text(error);
    const tgate_code said = tgate_error_code(error);
    tgate_error_free(error);
    error = nullptr;
    if (got != wanted || (got != TGATE_OK && (said != got || text.empty() || text.find('\n') != std::string::npos))) {
      fault(std::string(what) + ": code " + std::to_string(got) + ", wanted " + std::to_string(wanted) + ": " + text);
    }
  }

  void make_pool() {
    auto pool = std::make_unique<Pooled>();
    tgate_pool_options options;
    tgate_pool_options_init(&options, sizeof options);
    options.images = pool->images = 1 + below(9);
    pool->plans = world_.plans;
    std::shuffle(pool->plans.begin(), pool->plans.end(), random_);
    pool->plans.resize(1 + below(pool->plans.size()));
    std::vector<const char*> names;
    for (const std::string& name : pool->plans) {
      names.push_back(name.c_str());
    }
    options.plans = names.data();
    options.plan_count = names.size();
    tgate_error* error = nullptr;
    expect(tgate_pool_create(world_.session().get(), &options, &pool->handle, &error), TGATE_OK, error, "a pool");
    pools_.push_back(std::move(pool));
  }

  Drawn draw(const std::vector<std::string>& plans) {
    return {plans[below(plans.size())], below(std::size(prompts)), below(std::size(scales)), below(seeds)};
  }

  tgate_request_options fields(const Drawn& drawn, std::size_t images, Live& live) {
    tgate_request_options options;
    tgate_request_options_init(&options, sizeof options);
    options.plan = drawn.plan.c_str();
    options.prompt = prompts[drawn.prompt];
    options.guidance_scale = scales[drawn.scale];
    options.seed = drawn.seed;
    options.images = images;
    options.on_step = heard;
    options.user_data = &live;
    return options;
  }

  /// Looks at its request, does what is forbidden, and stops it where it is to.
  static std::int32_t heard(tgate_request* request, const tgate_progress* progress, void* user_data) {
    Live& live = *static_cast<Live*>(user_data);
    live.called = request == live.handle && progress->done == live.done + 1 && progress->total == live.total;
    tgate_progress own;
    tgate_progress_init(&own, sizeof own);
    live.called = live.called && tgate_request_progress(request, &own, nullptr) == TGATE_OK;
    live.called = live.called && own.done == progress->done;
    std::vector<float> latents(tgate_request_latents_count(request));
    for (std::size_t image = 0; image < live.images; ++image) {
      const tgate_code code = tgate_request_latents(request, image, latents.data(), latents.size(), nullptr);
      live.called = live.called && code == TGATE_OK;
    }
    live.called = live.called && tgate_request_step(request, nullptr) == TGATE_ARGUMENT;
    live.called = live.called && tgate_request_run(request, nullptr) == TGATE_ARGUMENT;
    live.called = live.called && tgate_batch(&request, 1, nullptr, nullptr) == TGATE_ARGUMENT;
    std::vector<std::uint8_t> pixels(live.decodes);
    if (!pixels.empty()) {
      const tgate_code code = tgate_request_decode(request, live.images - 1, pixels.data(), pixels.size(), nullptr);
      live.called = live.called && code == TGATE_OK;
    }
    if (live.cancels) {
      live.cancelled = true;
      tgate_request_cancel(request);
    }
    return live.stops ? 7 : 0;
  }

  void make_request() {
    auto live = std::make_unique<Live>();
    const Pooled* pool = below(6) == 0 ? nullptr : pools_[below(pools_.size())].get();
    live->first = draw(pool == nullptr ? world_.plans : pool->plans);
    live->images = 1 + below(below(3) == 0 ? 5 : 2);
    tgate_request_options options = fields(live->first, live->images, *live);
    options.pool = live->pool = pool == nullptr ? nullptr : pool->handle;
    const bool fits = pool == nullptr || live->images <= tgate_pool_free_images(pool->handle);
    tgate_error* error = nullptr;
    const tgate_code code = tgate_request_create(world_.session().get(), &options, &live->handle, &error);
    expect(code, fits ? TGATE_OK : TGATE_REQUEST, error, "a request");
    if (fits) {
      live->total = world_.alone(live->first).size() - 1;
      targets_.add(live.get());
      requests_.push_back(std::move(live));
    } else if (live->handle != nullptr) {
      fault("a request that was refused has a handle");
    }
  }

  const char* next_graph(const Live& live) {
    tgate_progress progress;
    tgate_progress_init(&progress, sizeof progress);
    tgate_request_progress(live.handle, &progress, nullptr);
    return progress.graph;
  }

  void whims(Live& live) {
    live.stops = below(40) == 0;
    live.cancels = below(40) == 0;
    tgate_picture_facts facts;
    tgate_picture_facts_init(&facts, sizeof facts);
    tgate_request_picture_facts(live.handle, &facts, nullptr);
    live.decodes = below(20) == 0 ? facts.bytes : 0;
    live.called = false;
  }

  /// After a step that may have been taken.
  void moved(Live& live) {
    const std::size_t before = live.done;
    tgate_progress progress;
    tgate_progress_init(&progress, sizeof progress);
    tgate_request_progress(live.handle, &progress, nullptr);
    live.done = progress.done;
    // Of a step of several calls that was ended between two, nobody hears.
    const bool heard = live.called || (disturbed_ && live.cancelled);
    if (live.done != before && (live.done != before + 1 || !heard)) {
      fault("a callback was not called as it should be");
    }
    if (live.done != before && live.stops) {
      live.cancelled = true;
    }
    live.stops = live.cancels = false;
  }

  void step(Live& live, bool all) {
    do {
      whims(live);
      const bool was = live.cancelled;
      const std::size_t before = live.done;
      tgate_error* error = nullptr;
      const tgate_code code = tgate_request_step(live.handle, &error);
      moved(live);
      const bool fails = was || live.cancelled;
      // Where the main thread is about to cancel it, the step may end before it does.
      const bool either = disturbed_ && fails && !was && code == TGATE_OK;
      expect(code, fails && !either ? TGATE_CANCELLED : TGATE_OK, error, "a step");
      if (!fails && live.done == before && live.done < live.total) {
        fault("a step was not taken");
      }
      all = all && !fails && live.done < live.total;
    } while (all);
  }

  void share() {
    Live& leader = any();
    const char* graph = next_graph(leader);
    std::vector<Live*> chosen;
    for (const auto& live : requests_) {
      const char* own = next_graph(*live);
      const bool same = own != nullptr && graph != nullptr && std::strcmp(own, graph) == 0;
      if (live->pool == leader.pool && (leader.pool != nullptr || live.get() == &leader) && same && below(4) > 0) {
        chosen.push_back(live.get());
      }
    }
    if (chosen.empty()) {
      return;
    }
    std::shuffle(chosen.begin(), chosen.end(), random_);
    std::vector<tgate_request*> handles;
    std::vector<char> was;
    for (Live* live : chosen) {
      whims(*live);
      handles.push_back(live->handle);
      was.push_back(live->cancelled);
    }
    std::vector<std::int32_t> stopped(chosen.size(), 9);
    tgate_error* error = nullptr;
    expect(tgate_batch(handles.data(), handles.size(), stopped.data(), &error), TGATE_OK, error, "a batch");
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      Live& live = *chosen[i];
      const std::size_t before = live.done;
      moved(live);
      const bool moves = !was[i];
      if (stopped[i] != (live.cancelled ? 1 : 0) && !(disturbed_ && live.cancelled)) {
        fault("stopped is " + std::to_string(stopped[i]));
      }
      if ((live.done == before + 1) != moves && !(disturbed_ && live.cancelled)) {
        fault("one of a batch was at " + std::to_string(before) + " and is at " + std::to_string(live.done));
      }
    }
  }

  void reset() {
    Live& live = any();
    Drawn drawn = draw(world_.plans);
    drawn.plan = live.first.plan;
    tgate_request_options options = fields(drawn, live.images, live);
    options.plan = below(2) == 0 ? nullptr : options.plan;
    const std::size_t how = below(5);
    bool begins = true, keeps = false;
    if (how == 0) {  // refused before anything of it is changed
      options.images += 1;
      keeps = true;
    } else if (how == 1) {  // refused when it had begun
      options.guidance_scale = std::numeric_limits<double>::quiet_NaN();
      begins = false;
    }
    targets_.with([&] {  // nobody cancels it meanwhile, or which of the two it was cannot be said
      tgate_error* error = nullptr;
      const bool was = live.cancelled;
      const tgate_code code = tgate_request_reset(live.handle, &options, &error);
      expect(code, keeps || !begins ? TGATE_REQUEST : TGATE_OK, error, "a reset");
      if (!keeps) {
        live.cancelled = !begins;
        live.first = begins ? drawn : live.first;
        live.done = begins ? 0 : live.done;
      } else {
        live.cancelled = was;
      }
    });
    if (!keeps && !begins) {
      check_cancelled(live);
    }
  }

  void check_cancelled(Live& live) {
    tgate_error* error = nullptr;
    expect(tgate_request_step(live.handle, &error), TGATE_CANCELLED, error, "a step of a cancelled request");
  }

  void stop() {
    Live& live = any();
    live.cancelled = true;
    tgate_request_cancel(live.handle);
    check_cancelled(live);
  }

  void drop(std::size_t index) {
    Live* live = requests_[index].get();
    targets_.remove(live);
    tgate_request_free(live->handle);
    requests_.erase(requests_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void drop_pool() {
    const std::size_t index = below(pools_.size());
    tgate_pool* pool = pools_[index]->handle;
    tgate_pool_free(pool);
    pools_.erase(pools_.begin() + static_cast<std::ptrdiff_t>(index));
    for (const auto& live : requests_) {
      // Its requests go on, together too; here they are told apart by nothing any more.
      live->pool = live->pool == pool ? nullptr : live->pool;
    }
  }

  void decode() {
    if (requests_.empty()) {
      return;
    }
    Live& live = any();
    tgate_picture_facts facts;
    tgate_picture_facts_init(&facts, sizeof facts);
    tgate_error* error = nullptr;
    expect(tgate_request_picture_facts(live.handle, &facts, &error), TGATE_OK, error, "a picture's facts");
    std::vector<std::uint8_t> pixels(facts.bytes);
    const bool is_there = below(5) > 0;
    const tgate_code code = tgate_request_decode(live.handle, is_there ? below(live.images) : live.images + below(3),
                                                 pixels.data(), pixels.size(), &error);
    // A step that was ended leaves nothing to decode.
    if (!(disturbed_ && live.cancelled)) {
      expect(code, is_there ? TGATE_OK : TGATE_ARGUMENT, error, "decoding");
    } else {
      tgate_error_free(error);
    }
  }

  /// Calls with arguments that are wrong: each is refused, and nothing has changed.
  void refused() {
    Live& live = any();
    tgate_request_options options = fields(live.first, live.images, live);
    tgate_error* error = nullptr;
    tgate_request* none = nullptr;
    std::vector<float> latents(tgate_request_latents_count(live.handle));
    tgate_request* twice[] = {live.handle, live.handle};
    const std::size_t room = latents.size();
    const tgate_session* session = world_.session().get();
    tgate_code code = TGATE_OK, wanted = TGATE_ARGUMENT;
    const std::size_t what = below(12);
    switch (what) {
      case 0: code = tgate_request_create(session, nullptr, &none, &error); break;
      case 1: code = tgate_batch(nullptr, 3, nullptr, &error); break;
      case 2: code = tgate_batch(twice, 0, nullptr, &error); break;
      case 3: code = tgate_request_latents(live.handle, live.images, latents.data(), room, &error); break;
      case 4: code = tgate_request_latents(live.handle, 0, latents.data(), room - 1, &error); break;
      case 5:
        options.images = std::numeric_limits<std::size_t>::max();
        wanted = TGATE_REQUEST;
        code = tgate_request_create(session, &options, &none, &error);
        break;
      case 6:
        options.seed = std::numeric_limits<std::uint64_t>::max();
        wanted = TGATE_REQUEST;
        code = tgate_request_create(session, &options, &none, &error);
        break;
      case 7:
        options.size += 1;
        code = tgate_request_create(session, &options, &none, &error);
        break;
      case 8:
        options.size = 0;
        code = tgate_request_reset(live.handle, &options, &error);
        break;
      case 9:
        options.initial_latents = latents.data();
        options.initial_latents_count = room * live.images - 1;
        wanted = TGATE_REQUEST;
        code = tgate_request_create(session, &options, &none, &error);
        break;
      case 10: code = tgate_request_decode(live.handle, 0, nullptr, 1U << 20U, &error); break;
      default:
        if (live.cancelled || live.done == live.total || disturbed_) {
          return;
        }
        code = tgate_batch(twice, 2, nullptr, &error);
    }
    expect(code, wanted, error, ("wrong arguments, number " + std::to_string(what)).c_str());
    if (none != nullptr) {
      fault("what was refused has a handle");
    }
  }

  void check(Live& live) {
    // A step that was ended in the middle leaves some of its images further than others, and is not to be used.
    if (live.cancelled || live.total == 0) {
      return;
    }
    std::vector<float> latents(tgate_request_latents_count(live.handle));
    for (std::size_t image = 0; image < live.images; ++image) {
      Drawn own = live.first;
      own.seed += image;
      const std::vector<float>& wanted = world_.alone(own)[live.done];
      tgate_request_latents(live.handle, image, latents.data(), latents.size(), nullptr);
      if (std::memcmp(wanted.data(), latents.data(), latents.size() * sizeof(float)) != 0) {
        float most = 0;
        for (std::size_t i = 0; i < latents.size(); ++i) {
          most = std::max(most, std::fabs(latents[i] - wanted[i]));
        }
        if (!live.cancelled) {
          fault("image " + std::to_string(image) + " of " + std::to_string(live.images) + " (plan " + own.plan +
                ") after step " + std::to_string(live.done) + " differs from what it is alone by " + std::to_string(most));
        }
      }
      ++compared;
    }
  }

  void check_room() {
    for (const auto& pool : pools_) {
      std::size_t taken = 0;
      for (const auto& live : requests_) {
        taken += live->pool == pool->handle ? live->images : 0;
      }
      if (tgate_pool_free_images(pool->handle) != pool->images - taken) {
        fault("a pool of " + std::to_string(pool->images) + " has room for " +
              std::to_string(tgate_pool_free_images(pool->handle)) + ", " + std::to_string(taken) + " are taken");
      }
    }
  }

  World& world_;
  Targets& targets_;
  std::mt19937 random_;
  bool disturbed_;
  std::vector<std::unique_ptr<Pooled>> pools_;
  std::vector<std::unique_ptr<Live>> requests_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::fprintf(stderr, "usage: host_sequences BUNDLE LIBRARY SEED SEQUENCES THREADS\n");
    return 2;
  }
  const auto seed = static_cast<std::uint32_t>(std::atoi(words[3]));
  const auto sequences = static_cast<std::uint32_t>(std::atoi(words[4]));
  const int threads = std::atoi(words[5]);
  World world(words[1], words[2]);
  Targets targets;
  std::atomic<std::uint32_t> next{0};
  std::atomic<std::size_t> calls{0}, compared{0};
  std::atomic<int> faults{0}, running{threads};
  const auto work = [&] {
    for (std::uint32_t number; faults == 0 && (number = next++) < sequences;) {
      try {
        Sequence sequence(world, targets, seed + number, threads > 1);
        calls += sequence.run();
        compared += sequence.compared;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "sequence %u: %s\n", seed + number, error.what());
        ++faults;
      }
    }
    --running;
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) {
    workers.emplace_back(work);
  }
  std::mt19937 odd(seed);
  while (threads > 1 && running > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(200 + odd() % 2000));
    targets.cancel(static_cast<std::uint32_t>(odd()));
  }
  for (std::thread& worker : workers) {
    worker.join();
  }
  std::printf("%u sequences, %zu calls, %zu images compared\n", sequences, calls.load(), compared.load());
  return faults == 0 ? 0 : 1;
}
