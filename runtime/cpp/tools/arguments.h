// What tgate-run is asked for.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tool {

/// A line for the user, and the exit code: 2 for what was typed, 1 for all else.
struct Refusal {
  std::string text;
  int exit_code;
};

struct Arguments {
  std::string bundle, prompt, negative_prompt, plan, size, generator = "numpy", output, initial_latents, save_latents, image;
  std::string engine = "ort-cpu", library, memory;
  std::vector<std::vector<std::int64_t>> token_ids, negative_token_ids;  ///< of each tokenizer
  std::map<std::string, double> loras;
  bool has_prompt = false, has_negative_prompt = false, quiet = false, cuda_graphs = false, help = false, version = false;
  std::uint64_t seed = 0;
  std::size_t images = 1;
  double guidance_scale = 0;
  int threads = 0, device = 0;
};

extern const char* const help;

/// Throws Refusal.
Arguments parse(int count, char** words);

}  // namespace tool
