// What callbacks of tgate.hpp throw, which of them is heard, and what it refuses itself: host_callbacks BUNDLE LIBRARY
//
// Prints a line for each thing that is not as it should be; ends in 1 where there is one.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <tgate.hpp>

namespace {

int faults = 0;

void check(bool good, const char* what) {
  if (!good) {
    std::printf("%s\n", what);
    ++faults;
  }
}

struct Odd : std::runtime_error {
  Odd() : std::runtime_error("odd") {}
};

template <class Thrown, class Work>
bool throws(Work work) {
  try {
    work();
  } catch (const Thrown&) {
    return true;
  }
  return false;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: host_callbacks BUNDLE LIBRARY\n");
    return 2;
  }
  tgate::SessionOptions options;
  options.library = words[2];
  options.threads = 1;
  const tgate::Bundle bundle(words[1]);
  const tgate::Session session(bundle, options);
  const tgate::Pool pool(session, 3);
  int heard = 0;
  tgate::RequestOptions ask;
  ask.prompt = "a red circle";
  ask.on_step = [&](const tgate_progress&) { return ++heard > 0; };
  tgate::Request request(session, ask);
  request.step();
  tgate::RequestOptions wrong;  // which is refused, so that the request is the one that it was
  wrong.images = 2;
  check(throws<tgate::Failure>([&] { request.reset(wrong); }), "a request was begun anew with more images");
  request.step();
  check(heard == 2 && request.progress().done == 2, "who was refused to begin anew lost its callback");

  ask.on_step = [](const tgate_progress&) -> bool { throw Odd(); };
  request.reset(ask);
  check(throws<Odd>([&] { request.step(); }), "a step did not throw what its callback threw");
  check(throws<tgate::Failure>([&] { request.step(); }), "a request whose callback threw goes on");
  request.reset(ask);
  check(throws<Odd>([&] { request.run(); }), "a run did not throw what its callback threw");

  ask.pool = &pool;
  const tgate::Request thrower(session, ask);
  ask.on_step = nullptr;
  tgate::Request one(session, ask), other(session, ask);
  check(throws<Odd>([&] { tgate::batch({&one, &thrower, &other}); }), "a batch did not throw what a callback threw");
  check(one.progress().done == 1 && other.progress().done == 1, "what one callback threw kept others from their step");
  const auto stopped = tgate::batch({&one, &thrower, &other});
  check(stopped == std::vector<std::int32_t>({0, 1, 0}), "who threw is not the one that is left out");
  check(one.latents() == other.latents(), "two of a batch differ");
  one.run();

  using namespace std::string_literals;
  for (std::string tgate::RequestOptions::* const text :
       {&tgate::RequestOptions::prompt, &tgate::RequestOptions::negative_prompt, &tgate::RequestOptions::generator}) {
    tgate::RequestOptions cut = ask;
    cut.*text = "a red\0 circle"s;
    check(throws<std::invalid_argument>([&] { tgate::Request(session, cut); }), "a text was cut off at a NUL");
  }
  check(throws<std::invalid_argument>([&] { tgate::Bundle("mini\0"s); }), "a bundle's path was cut off at a NUL");

  tgate::Request moved = std::move(one);
  check(moved.progress().graph == nullptr, "a request that was moved is another");
  std::printf("%d faults\n", faults);
  return faults == 0 ? 0 : 1;
}
