// Memory that is not there: host_memory BUNDLE LIBRARY
//
// Every allocation that libtgate makes by itself in a call fails once, call by call. Each such call must end in
// TGATE_MEMORY, and leave everything as the next call needs it. Prints how many failed; ends in 1 at the first fault.
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <tgate.h>
#include <vector>

namespace {

long left = -1;  // allocations until the one that fails; below 0 none does
bool looking = false;

/// Whether libtgate asks, and not the engine that it has called. Frame 1 is operator new's.
bool is_ours() {
  looking = true;
  void* frames[4];
  const int count = backtrace(frames, 4);
  bool ours = false;
  for (int i = 1; i < count; ++i) {
    Dl_info found{};
    if (dladdr(frames[i], &found) != 0 && found.dli_fname != nullptr) {
      ours = ours || std::strstr(found.dli_fname, "libtgate") != nullptr;
      if (std::strstr(found.dli_fname, "onnxruntime") != nullptr) {
        ours = false;
        break;
      }
    }
  }
  looking = false;
  return ours;
}

[[noreturn]] void fault(const char* what, long at, tgate_code code) {
  std::printf("%s, allocation %ld: code %d\n", what, at, code);
  std::exit(1);
}

/// Makes one allocation after the other fail until the call does without. How many failed.
long each(const char* what, const std::function<tgate_code(tgate_error**)>& call, const std::function<void()>& after) {
  for (long at = 0;; ++at) {
    tgate_error* error = nullptr;
    left = at;
    const tgate_code code = call(&error);
    const bool failed = left < 0;
    left = -1;
    if (code != (failed ? TGATE_MEMORY : TGATE_OK) || tgate_error_code(error) != code) {
      fault(what, at, code);
    }
    tgate_error_free(error);
    after();
    if (!failed) {
      return at;
    }
  }
}

}  // namespace

void* operator new(std::size_t bytes) {
  if (left >= 0 && !looking && is_ours() && left-- == 0) {
    throw std::bad_alloc();
  }
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  return memory != nullptr ? memory : throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: host_memory BUNDLE LIBRARY\n");
    return 2;
  }
  constexpr std::size_t all = 3;
  tgate_bundle* bundle = nullptr;
  tgate_session* session = nullptr;
  tgate_pool* pool = nullptr;
  tgate_request* requests[all] = {};
  tgate_session_options options;
  tgate_session_options_init(&options, sizeof options);
  options.library = words[2];
  options.threads = 1;
  tgate_bundle_open(words[1], nullptr, &bundle, nullptr);
  if (tgate_session_open(bundle, &options, &session, nullptr) != TGATE_OK) {
    return 2;
  }
  tgate_pool_options room;
  tgate_pool_options_init(&room, sizeof room);
  room.images = all;
  tgate_request_options ask;
  tgate_request_options_init(&ask, sizeof ask);
  ask.prompt = "red circle";

  long failed = each("a pool", [&](tgate_error** error) { return tgate_pool_create(session, &room, &pool, error); },
                     [&] { tgate_pool_free(pool), pool = nullptr; });
  tgate_pool_create(session, &room, &pool, nullptr);
  ask.pool = pool;
  failed += each("a request", [&](tgate_error** error) { return tgate_request_create(session, &ask, requests, error); },
                 [&] {
                   tgate_request_free(requests[0]), requests[0] = nullptr;
                   if (tgate_pool_free_images(pool) != all) {
                     fault("the room of a request that was not made", 0, TGATE_OK);
                   }
                 });
  for (tgate_request*& request : requests) {
    tgate_request_create(session, &ask, &request, nullptr);
  }
  failed += each("a request begun anew", [&](tgate_error** error) { return tgate_request_reset(requests[1], &ask, error); },
                 [&] {
                   if (tgate_request_reset(requests[1], &ask, nullptr) != TGATE_OK) {
                     fault("a request begun anew after that", 0, TGATE_OK);
                   }
                 });
  // Two of three are a call that has not been made yet, so it is bound, and one is moved; the pool is another each time.
  tgate_request* together[] = {requests[2], requests[0]};
  failed += each("a batch", [&](tgate_error** error) { return tgate_batch(together, 2, nullptr, error); },
                 [&] {
                   std::int32_t stopped[2];
                   if (tgate_batch(together, 2, stopped, nullptr) != TGATE_OK || stopped[0] != stopped[1]) {
                     fault("the batch after that", 0, TGATE_OK);
                   }
                   for (tgate_request*& request : requests) {
                     tgate_request_free(request);
                   }
                   tgate_pool_free(pool);
                   tgate_pool_create(session, &room, &pool, nullptr);
                   ask.pool = pool;
                   for (tgate_request*& request : requests) {
                     tgate_request_create(session, &ask, &request, nullptr);
                   }
                   together[0] = requests[2], together[1] = requests[0];
                 });
  std::printf("%ld allocations failed\n", failed);
  for (tgate_request* request : requests) {
    tgate_request_free(request);
  }
  tgate_pool_free(pool);
  tgate_session_free(session);
  tgate_bundle_free(bundle);
  return 0;
}
