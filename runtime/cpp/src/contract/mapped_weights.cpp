#include "contract/mapped_weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "contract/error.h"

namespace tgate {

MappedWeights::MappedWeights(const Bundle& bundle) {
  const std::string path = bundle.path() + "/" + bundle.manifest().weights;
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  struct stat found {};
  if (file < 0 || fstat(file, &found) != 0) {
    if (file >= 0) ::close(file);
    throw Error(Code::bundle, path + " cannot be opened; copy or export the bundle again");
  }
  bytes_ = static_cast<std::size_t>(found.st_size);
  memory_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
  ::close(file);
  if (memory_ == MAP_FAILED) {
    throw Error(Code::memory, path + " cannot be mapped");
  }
}

MappedWeights::~MappedWeights() { munmap(memory_, bytes_); }

}  // namespace tgate
