// Work that is shared out among the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace tgate {

/// Does each of `count` pieces of work, on as many threads as there are cores. Throws what the first piece that failed
/// threw, by its number.
template <class Work>
void on_all_cores(std::size_t count, Work work) {
  std::atomic<std::size_t> next{0};
  std::vector<std::exception_ptr> faults(count);
  const auto run = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < count;) {
      try {
        work(i);
      } catch (...) {
        faults[i] = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  const std::size_t most = std::min<std::size_t>(count, std::max(1u, std::thread::hardware_concurrency()));
  try {
    while (threads.size() + 1 < most) threads.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads are to be had; this one is there
  }
  run();
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& fault : faults) {
    if (fault) std::rethrow_exception(fault);
  }
}

}  // namespace tgate
