// Room for images of one size: every buffer of their trajectories, allocated before the first step and bound once.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "run/session.h"

namespace tgate {

/// A plan as a pool walks it: numbers where the plan has names.
struct Program {
  struct Move {
    std::size_t graph;                        ///< of the pool's
    std::array<float, step_row_length> row;   ///< with 0 for the guidance scale
    bool noise;
    std::vector<std::size_t> live;            ///< carries' buffers that this step or a later one reads as they are now
  };
  const Plan* plan;
  int reach;
  std::vector<Move> moves;
};

/// One image: the next step of its plan, and what is its own. Its request owns it; the pool knows its place.
struct Image {
  const Program* program = nullptr;
  std::size_t position = 0;
  std::size_t row = 0;
  float guidance_scale = 0;
  std::uint64_t seed = 0;
  Generator generator = Generator::numpy;
};

/// What conditions one image: `<name>.<half>` to its numbers.
using Halves = std::map<std::string, const HostTensor*, std::less<>>;

/// Images of one pool may be at different steps of different plans; those whose next steps run one graph can share a
/// call. One thread at a time, but for `bytes`.
class Pool {
 public:
  /// `together`: all its images take every step together. Throws Error of Code::request for a size that is not loaded, Code::memory where there is not so much, and others.
  Pool(std::shared_ptr<const Session> session, std::string_view size, const std::vector<std::string>& plans,
       std::size_t images, bool together);

  [[nodiscard]] const Session& session() const { return *session_; }
  [[nodiscard]] const Shape& shape() const { return *shapes_.front(); }
  [[nodiscard]] std::size_t free_rows() const { return free_; }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] std::uint64_t moved() const { return moved_; }
  /// A plan that images may follow. Throws Error of Code::request, which lists them; where `name` is empty it is
  /// "default" or the one that there is.
  [[nodiscard]] const Program& program(std::string_view name) const;
  [[nodiscard]] const std::string& graph_name(std::size_t graph) const { return graphs_[graph].name; }
  /// The conditioning that its graphs take, as `<name>.<half>`.
  [[nodiscard]] const std::vector<std::string>& halves() const { return half_names_; }

  /// A place for an image, or its place again. Throws Error of Code::request where there is none.
  void place(Image& image);
  void release(Image& image) noexcept;

  /// Start an image in its place: x_0 is `noise` [latents] times the plan's initial scale, its history zeros.
  void begin(Image& image, const float* noise, const Halves& conditioning);

  /// Take one step of each of `count` images, whose next steps run one graph, in as few calls as batches allow. Throws
  /// Error; images of a call that failed are where they were, and what they hold is not to be used.
  /// `interrupt` ends the calls, and may be null. Allocates nothing once a call has been made in the same places.
  void step(Image* const* images, std::size_t count, Interrupt* interrupt);

  /// The pool is one thread's while this lives. Throws Error of Code::argument where it is another's.
  class Use {
   public:
    explicit Use(Pool& pool);
    ~Use() { pool_.busy_.clear(std::memory_order_release); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Pool& pool_;
  };

  /// An image's latents after the last step taken, float32 [latents].
  void latents(const Image& image, float* out) const;

 private:
  struct Buffer {
    TensorSpec tensor;
    std::size_t row_bytes;
    DeviceMemory memory;
    [[nodiscard]] std::byte* at(std::size_t row) const { return memory->address() + row * row_bytes; }
  };
  /// A graph as some step wants it.
  struct GraphUse {
    std::string name;
    std::vector<std::string> writes;  ///< the carries that it keeps, sorted
    std::size_t whole;                ///< the use of the same graph that keeps what any step does: for calls of several
  };

  [[nodiscard]] std::size_t find(std::string_view name) const;
  [[nodiscard]] Buffer& buffer(std::string_view name) { return buffers_[find(name)]; }
  void compile(const Plan& plan);
  std::size_t use_of(const std::string& graph, std::vector<std::string> writes);
  /// Makes the images neighbours, with `rows` rows from the first one on that are theirs or nobody's; the first row.
  std::size_t gather(Image* const* images, std::size_t count, std::size_t rows);
  void move_row(std::size_t from, std::size_t to);
  void swap_rows(std::size_t one, std::size_t other);
  Call& call(std::size_t graph, std::size_t first, std::size_t rows);
  void run(Image* const* images, std::size_t count, std::size_t first, std::size_t rows, Interrupt& interrupt);
  void draw_step_noise(const Image& image);
  /// Moves the history of images on, as far back as any of them reads.
  void turn(std::size_t first, std::size_t count, int reach);
  [[nodiscard]] static bool neighbours(Image* const* images, std::size_t count);

  std::shared_ptr<const Session> session_;
  std::shared_ptr<const Engine> engine_;
  std::vector<const Shape*> shapes_;
  std::vector<GraphUse> graphs_;
  std::vector<std::unique_ptr<Program>> programs_;
  std::vector<Buffer> buffers_;
  std::vector<std::string> half_names_;
  std::vector<std::size_t> half_buffers_;
  std::array<std::size_t, history + 1> latents_{}, outputs_{};  // by lag; buffers_.size() where no graph reads it
  std::size_t noise_ = 0;
  /// What every step touches, in a few cache lines: after an engine's call nothing else of the host is in any cache.
  struct Steady {
    std::array<std::byte*, history + 1> latents{}, outputs{};  // of row 0, by lag; null where no graph reads it
    std::byte *next_latents = nullptr, *step = nullptr, *noise = nullptr;
    std::size_t row_bytes = 0;  // of one image's latents, and of all that is like them
    std::size_t together = 0;   // how many images the last step took in one call; 0 where it took several
  } steady_;
  std::vector<Image*> rows_;  // who is where
  std::vector<Image*> ordered_;
  std::vector<std::uint8_t> marks_;
  std::vector<float> drawn_, numbers_;
  std::vector<std::byte> encoded_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Call>> calls_;
  std::unique_ptr<Interrupt> interrupt_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::size_t free_ = 0;
  std::uint64_t bytes_ = 0, moved_ = 0;
};

/// How many of `left` images the next call takes, and how many rows it has: more where no batch is so small.
std::pair<std::size_t, std::size_t> next_call(const std::vector<const Shape*>& shapes, std::size_t left);

/// How many rows the calls on so many images have. Throws Error of Code::request for none, or for more than any machine
/// has room for.
std::size_t rows_of_calls(const std::vector<const Shape*>& shapes, std::size_t images);

}  // namespace tgate
