// One prompt, picture or set of tensors, and its images, walking one plan.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "contract/error.h"
#include "run/pool.h"

namespace tgate {

/// What a request asks for; views of what the caller holds, read until the call returns.
struct Ask {
  std::string plan;  ///< empty: "default", or the pool's only one
  std::string image_size;
  std::size_t images = 1;
  std::uint64_t seed = 0;
  Generator generator = Generator::numpy;
  double guidance_scale = 0;  ///< 0: the plan's

  using Ids = std::vector<std::vector<std::int64_t>>;
  std::optional<std::string> prompt, negative_prompt;
  std::optional<Ids> ids, negative_ids;
  std::optional<std::vector<std::pair<std::string, HostTensor>>> tensors;
  const std::uint8_t* picture = nullptr;
  std::size_t picture_bytes = 0;

  const float* initial_latents = nullptr;
  std::size_t initial_latents_count = 0;
  /// Hears of every step; false stops the request.
  std::function<bool()> on_step;
};

/// Belongs to one thread at a time, but for `cancel`. Its pool may be shared with other requests of that thread.
class Request {
 public:
  /// Checks everything, encodes the prompt, and takes its room. `pool` null: a pool of its own. Throws Error.
  Request(const std::shared_ptr<const Session>& session, std::shared_ptr<Pool> pool, const Ask& ask);
  ~Request();
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  /// Begin anew in the same room. Throws Error; the request then is as if it had been cancelled.
  void reset(const Ask& ask);
  /// One step, or nothing at the end. Throws Error, of Code::cancelled where it was cancelled.
  void step();
  /// Throws Error where it was cancelled, or a step of it failed.
  void check_usable() const;
  /// From any thread.
  void cancel() noexcept;
  [[nodiscard]] bool cancelled() const noexcept { return cancelled_.load(std::memory_order_acquire); }

  [[nodiscard]] const std::shared_ptr<Pool>& pool() const { return pool_; }
  [[nodiscard]] const Program& program() const { return *program_; }
  [[nodiscard]] std::size_t position() const { return images_.front()->position; }
  [[nodiscard]] bool done() const { return position() == program_->moves.size(); }
  [[nodiscard]] std::size_t images() const { return images_.size(); }
  [[nodiscard]] const std::string& cut() const { return cut_; }

  /// One image's latents as they are now, float32. Throws Error of Code::argument for an image that is not there, and as
  /// check_usable where a step failed or was ended midway: some images may be a step further then than others.
  void latents(std::size_t image, float* out) const;
  /// Their picture: RGB.
  void decode(std::size_t image, std::uint8_t* pixels, std::size_t bytes);
  /// What that is. Throws Error of Code::request where the bundle has no decoder.
  [[nodiscard]] Session::Picture picture() const { return session_->picture(pool_->shape()); }

 private:
  friend void step_together(Request* const* requests, std::size_t count, std::int32_t* stopped);

  void begin(const Ask& ask);
  void check(const Ask& ask) const;
  [[nodiscard]] float guidance(double asked) const;
  void after_step();
  void failed(const std::exception& fault);

  std::shared_ptr<const Session> session_;
  std::shared_ptr<Pool> pool_;
  const Program* program_ = nullptr;
  std::vector<std::unique_ptr<Image>> images_;
  std::vector<Image*> views_;
  std::mutex guard_;  // of these two, which change together
  std::unique_ptr<Interrupt> interrupt_;
  std::atomic<bool> cancelled_{true};
  std::string fault_;  // of a step that failed, after which nothing here is worth anything
  bool in_batch_ = false;
  std::string cut_;
  std::vector<float> scratch_;
  std::function<bool()> on_step_;
};

/// One step of each of the requests of one pool, whose next steps run one graph; see tgate_batch. `stopped` may be null.
void step_together(Request* const* requests, std::size_t count, std::int32_t* stopped);

}  // namespace tgate
