/// libtgate for C++: the C ABI of tgate.h with owners, exceptions and vectors. Header-only; C++17.
///
///     tgate::Bundle bundle("bundles/mini");
///     tgate::Session session(bundle);
///     tgate::RequestOptions ask;
///     ask.prompt = "a green star above a red disk";
///     ask.seed = 7;
///     tgate::Request request(session, ask);
///     request.run();
///     tgate::Picture picture = request.decode(0);   // picture.pixels: RGB, rows from the top
///
/// Everything here is movable, not copyable, and frees what it owns. Threads: as tgate.h says. A text that holds a NUL, where
/// C would end it, is refused by std::invalid_argument.
#ifndef TGATE_HPP
#define TGATE_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tgate.h"

namespace tgate {

/// What a call of the library failed with.
class Failure : public std::exception {
 public:
  explicit Failure(tgate_error* error) : code_(tgate_error_code(error)), text_(tgate_error_text(error)) {
    tgate_error_free(error);
  }
  [[nodiscard]] const char* what() const noexcept override { return text_.c_str(); }
  [[nodiscard]] tgate_code code() const noexcept { return code_; }

 private:
  tgate_code code_;
  std::string text_;
};

namespace detail {

/// Calls `function` with a place for an error; throws what is put there.
template <class Function>
void call(Function&& function) {
  tgate_error* error = nullptr;
  if (function(&error) != TGATE_OK) {
    throw Failure(error);
  }
}

template <auto Free>
struct Deleter {
  template <class T>
  void operator()(T* handle) const noexcept {
    Free(handle);
  }
};

template <class T, auto Free>
using Owner = std::unique_ptr<T, Deleter<Free>>;

/// A text as C has it, for as long as `text` lives.
inline const char* in_c(const std::string& text) {
  if (const std::size_t end = text.find('\0'); end != std::string::npos) {
    throw std::invalid_argument("a text has a NUL at byte " + std::to_string(end) + ", where C would end it; take it out");
  }
  return text.c_str();
}

inline const char* or_null(const std::string& text) { return text.empty() ? nullptr : in_c(text); }

inline std::vector<const char*> pointers(const std::vector<std::string>& texts) {
  std::vector<const char*> all;
  for (const std::string& text : texts) {
    all.push_back(in_c(text));
  }
  return all;
}

}  // namespace detail

/// See tgate_bundle.
class Bundle {
 public:
  explicit Bundle(const std::string& path, bool check_digests = true) {
    tgate_bundle_options options;
    tgate_bundle_options_init(&options, sizeof options);
    options.check_digests = check_digests ? 1 : 0;
    const char* place = detail::in_c(path);
    detail::call([&](tgate_error** error) {
      tgate_bundle* bundle = nullptr;
      const tgate_code code = tgate_bundle_open(place, &options, &bundle, error);
      handle_.reset(bundle);
      return code;
    });
  }
  [[nodiscard]] const tgate_bundle* get() const noexcept { return handle_.get(); }
  /// Its strings live as long as the bundle.
  [[nodiscard]] tgate_bundle_facts facts() const {
    tgate_bundle_facts facts;
    tgate_bundle_facts_init(&facts, sizeof facts);
    detail::call([&](tgate_error** error) { return tgate_bundle_facts_get(get(), &facts, error); });
    return facts;
  }
  [[nodiscard]] std::vector<std::string> plans() const { return names(tgate_bundle_plan); }
  [[nodiscard]] std::vector<std::string> sizes() const { return names(tgate_bundle_size); }
  [[nodiscard]] std::vector<std::string> adapters() const { return names(tgate_bundle_adapter); }
  /// What requests take, in bytes, before any of it is taken. Empty texts are the defaults.
  [[nodiscard]] tgate_memory memory(const std::string& plan = {}, const std::string& size = {}, std::size_t images = 1) const {
    tgate_memory memory;
    tgate_memory_init(&memory, sizeof memory);
    detail::call([&](tgate_error** error) {
      return tgate_bundle_memory(get(), detail::or_null(plan), detail::or_null(size), images, &memory, error);
    });
    return memory;
  }

 private:
  template <class Name>
  [[nodiscard]] std::vector<std::string> names(Name name) const {
    std::vector<std::string> all;
    for (std::size_t i = 0; const char* text = name(get(), i); ++i) {
      all.emplace_back(text);
    }
    return all;
  }
  detail::Owner<tgate_bundle, tgate_bundle_free> handle_;
};

/// RGB, one byte a colour, rows from the top; of a video, one picture after the other.
struct Picture {
  std::int32_t width = 0, height = 0, frames = 0;
  std::vector<std::uint8_t> pixels;
};

/// The fields of tgate_session_options; empty is the default.
struct SessionOptions {
  std::string engine = "ort-cpu", library, memory;
  std::vector<std::string> plans, sizes;
  int threads = 0, device = 0;
  void* stream = nullptr;
  bool cuda_graphs = false;
};

/// See tgate_session.
class Session {
 public:
  explicit Session(const Bundle& bundle, const SessionOptions& asked = {}) {
    const auto plans = detail::pointers(asked.plans), sizes = detail::pointers(asked.sizes);
    tgate_session_options options;
    tgate_session_options_init(&options, sizeof options);
    options.engine = detail::in_c(asked.engine);
    options.library = detail::or_null(asked.library);
    options.memory = detail::or_null(asked.memory);
    options.plans = plans.empty() ? nullptr : plans.data();
    options.plan_count = plans.size();
    options.sizes = sizes.empty() ? nullptr : sizes.data();
    options.size_count = sizes.size();
    options.threads = asked.threads;
    options.device = asked.device;
    options.stream = asked.stream;
    options.cuda_graphs = asked.cuda_graphs ? 1 : 0;
    detail::call([&](tgate_error** error) {
      tgate_session* session = nullptr;
      const tgate_code code = tgate_session_open(bundle.get(), &options, &session, error);
      handle_.reset(session);
      return code;
    });
  }
  /// A session of the same graphs whose weights include adapters of the bundle: their names, and what each is multiplied
  /// with. See tgate_session_adapted.
  [[nodiscard]] Session adapted(const std::map<std::string, double>& scales) const {
    std::vector<tgate_adapter> adapters;
    for (const auto& [name, scale] : scales) {
      adapters.push_back({detail::in_c(name), scale});
    }
    Session made;
    detail::call([&](tgate_error** error) {
      tgate_session* session = nullptr;
      const tgate_code code = tgate_session_adapted(get(), adapters.data(), adapters.size(), &session, error);
      made.handle_.reset(session);
      return code;
    });
    return made;
  }
  [[nodiscard]] const tgate_session* get() const noexcept { return handle_.get(); }
  [[nodiscard]] std::string engine() const { return tgate_session_engine(get()); }
  [[nodiscard]] std::string advice() const { return tgate_session_advice(get()); }
  /// One image's latents, in any thread. `size` empty is the session's first.
  [[nodiscard]] Picture decode(const std::vector<float>& latents, const std::string& size = {}) const {
    tgate_picture_facts facts;
    tgate_picture_facts_init(&facts, sizeof facts);
    detail::call([&](tgate_error** error) {
      return tgate_session_picture_facts(get(), detail::or_null(size), &facts, error);
    });
    Picture picture{facts.width, facts.height, facts.frames, std::vector<std::uint8_t>(facts.bytes)};
    detail::call([&](tgate_error** error) {
      return tgate_session_decode(get(), detail::or_null(size), latents.data(), latents.size(), picture.pixels.data(),
                                  picture.pixels.size(), error);
    });
    return picture;
  }

 private:
  Session() = default;
  detail::Owner<tgate_session, tgate_session_free> handle_;
};

/// See tgate_pool.
class Pool {
 public:
  explicit Pool(const Session& session, std::size_t images, const std::vector<std::string>& plans = {},
                const std::string& size = {}) {
    const auto names = detail::pointers(plans);
    tgate_pool_options options;
    tgate_pool_options_init(&options, sizeof options);
    options.images = images;
    options.image_size = detail::or_null(size);
    options.plans = names.empty() ? nullptr : names.data();
    options.plan_count = names.size();
    detail::call([&](tgate_error** error) {
      tgate_pool* pool = nullptr;
      const tgate_code code = tgate_pool_create(session.get(), &options, &pool, error);
      handle_.reset(pool);
      return code;
    });
  }
  [[nodiscard]] tgate_pool* get() const noexcept { return handle_.get(); }
  [[nodiscard]] std::size_t free_images() const { return tgate_pool_free_images(get()); }

 private:
  detail::Owner<tgate_pool, tgate_pool_free> handle_;
};

/// What most requests ask for. Everything else is in tgate_request_options, which a Request takes as well.
struct RequestOptions {
  std::string prompt, negative_prompt, plan, size;
  bool has_negative_prompt = false;  ///< where it is the empty prompt
  std::size_t images = 1;
  std::uint64_t seed = 0;
  double guidance_scale = 0;
  std::string generator = "numpy";
  const Pool* pool = nullptr;
  /// Hears of every step; false stops the request.
  std::function<bool(const tgate_progress&)> on_step;
};

/// See tgate_request.
class Request {
 public:
  Request(const Session& session, const RequestOptions& asked) : hear_(new Hear{asked.on_step, nullptr}) {
    make(session, fields(asked));
  }
  /// `options` as tgate.h has them, callback included.
  Request(const Session& session, const tgate_request_options& options) { make(session, options); }

  [[nodiscard]] tgate_request* get() const noexcept { return handle_.get(); }
  void reset(const RequestOptions& asked) {
    if (hear_ == nullptr) {
      hear_.reset(new Hear{});
    }
    std::function<bool(const tgate_progress&)> on_step = asked.on_step;
    const tgate_request_options options = fields(asked);
    detail::call([&](tgate_error** error) { return tgate_request_reset(get(), &options, error); });
    hear_->on_step.swap(on_step);  // only now: a request that was not begun anew goes on as it was
    hear_->thrown = nullptr;
  }
  void step() {
    finish([&](tgate_error** error) { return tgate_request_step(get(), error); });
  }
  void run() {
    finish([&](tgate_error** error) { return tgate_request_run(get(), error); });
  }
  /// From any thread.
  void cancel() const noexcept { tgate_request_cancel(get()); }
  [[nodiscard]] tgate_progress progress() const {
    tgate_progress progress;
    tgate_progress_init(&progress, sizeof progress);
    detail::call([&](tgate_error** error) { return tgate_request_progress(get(), &progress, error); });
    return progress;
  }
  [[nodiscard]] std::string cut() const { return tgate_request_cut(get()); }
  [[nodiscard]] std::vector<float> latents(std::size_t image = 0) const {
    std::vector<float> latents(tgate_request_latents_count(get()));
    detail::call([&](tgate_error** error) {
      return tgate_request_latents(get(), image, latents.data(), latents.size(), error);
    });
    return latents;
  }
  [[nodiscard]] Picture decode(std::size_t image = 0) const {
    tgate_picture_facts facts;
    tgate_picture_facts_init(&facts, sizeof facts);
    detail::call([&](tgate_error** error) { return tgate_request_picture_facts(get(), &facts, error); });
    Picture picture{facts.width, facts.height, facts.frames, std::vector<std::uint8_t>(facts.bytes)};
    detail::call([&](tgate_error** error) {
      return tgate_request_decode(get(), image, picture.pixels.data(), picture.pixels.size(), error);
    });
    return picture;
  }

 private:
  struct Hear {
    std::function<bool(const tgate_progress&)> on_step;
    std::exception_ptr thrown;
  };

  /// An exception of the callback's stops the request, and comes out of the call that it was heard in.
  static std::int32_t heard(tgate_request* /*request*/, const tgate_progress* progress, void* user_data) {
    auto& hear = *static_cast<Hear*>(user_data);
    try {
      return hear.on_step(*progress) ? 0 : 1;
    } catch (...) {
      hear.thrown = std::current_exception();
      return 1;
    }
  }

  tgate_request_options fields(const RequestOptions& asked) const {
    tgate_request_options options;
    tgate_request_options_init(&options, sizeof options);
    options.pool = asked.pool == nullptr ? nullptr : asked.pool->get();
    options.plan = detail::or_null(asked.plan);
    options.image_size = detail::or_null(asked.size);
    options.images = asked.images;
    options.seed = asked.seed;
    options.generator = detail::in_c(asked.generator);
    options.guidance_scale = asked.guidance_scale;
    options.prompt = detail::in_c(asked.prompt);
    const bool negative = asked.has_negative_prompt || !asked.negative_prompt.empty();
    options.negative_prompt = negative ? detail::in_c(asked.negative_prompt) : nullptr;
    if (asked.on_step) {
      options.on_step = heard;
      options.user_data = hear_.get();
    }
    return options;
  }

  void make(const Session& session, const tgate_request_options& options) {
    detail::call([&](tgate_error** error) {
      tgate_request* request = nullptr;
      const tgate_code code = tgate_request_create(session.get(), &options, &request, error);
      handle_.reset(request);
      return code;
    });
  }

  template <class Function>
  void finish(Function&& function) {
    tgate_error* error = nullptr;
    if (function(&error) != TGATE_OK) {
      if (hear_ != nullptr && hear_->thrown != nullptr) {
        tgate_error_free(error);
        rethrow();
      }
      throw Failure(error);
    }
  }

  void rethrow() const {
    if (hear_ != nullptr && hear_->thrown != nullptr) {
      std::rethrow_exception(std::exchange(hear_->thrown, nullptr));
    }
  }

  friend std::vector<std::int32_t> batch(const std::vector<const Request*>& requests);

  std::unique_ptr<Hear> hear_;  // outlives the handle, which has its address
  detail::Owner<tgate_request, tgate_request_free> handle_;
};

/// One step of each of several requests of one pool; see tgate_batch. Which of them were stopped. What a callback threw
/// comes out when all have taken their step.
inline std::vector<std::int32_t> batch(const std::vector<const Request*>& requests) {
  std::vector<tgate_request*> handles;
  for (const Request* request : requests) {
    handles.push_back(request->get());
  }
  std::vector<std::int32_t> stopped(handles.size());
  detail::call([&](tgate_error** error) { return tgate_batch(handles.data(), handles.size(), stopped.data(), error); });
  for (const Request* request : requests) {
    request->rethrow();
  }
  return stopped;
}

}  // namespace tgate

#endif  // TGATE_HPP
