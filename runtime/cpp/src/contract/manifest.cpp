// What is asked of a manifest once it is read.
#include "contract/manifest.h"

#include <algorithm>

#include "contract/error.h"

namespace tgate {

std::int64_t Shape::latents_count() const {
  std::int64_t count = 1;
  for (const std::int64_t dim : latents) count *= dim;
  return count;
}

const GraphSpec* Shape::graph(Role role) const {
  for (const auto& entry : graphs) {
    if (entry.second.role == role) return &entry.second;
  }
  return nullptr;
}

const Plan& Manifest::plan(std::string_view name) const {
  std::vector<std::string> have;
  for (const auto& [own, plan] : plans) {
    if (own == name) return plan;
    have.push_back(own);
  }
  std::sort(have.begin(), have.end());
  std::string listed;
  for (const std::string& own : have) listed += (listed.empty() ? "" : ", ") + own;
  throw Error(Code::bundle, "the bundle has no plan '" + shown(name) + "'; it has " + (have.empty() ? "none" : listed) +
                                ". Add one with `tgate plan`.");
}

void Manifest::check_scale(const Plan& own) const {
  if (takes_scale(own.guidance_scale)) return;
  throw Error(Code::plan, "plan '" + shown(own.name) + "' has guidance scale " + json::repr(own.guidance_scale) +
                              ", which does not fit a bundle " + (guided() ? "with" : "without") +
                              " guidance. Make it again with `tgate plan`.");
}

std::vector<std::string> Manifest::sizes() const {
  std::vector<std::string> names;
  for (const Shape& shape : shapes) {
    std::string size = shape.size();
    if (std::find(names.begin(), names.end(), size) == names.end()) names.push_back(std::move(size));
  }
  return names;
}

std::vector<const Shape*> Manifest::shapes_of(std::string_view size) const {
  const std::string wanted = size.empty() ? shapes.front().size() : std::string(size);
  std::vector<const Shape*> found;
  for (const Shape& shape : shapes) {
    if (shape.size() == wanted) found.push_back(&shape);
  }
  if (found.empty()) {
    std::string listed;
    for (const std::string& own : sizes()) listed += (listed.empty() ? "" : ", ") + own;
    throw Error(Code::bundle, "the bundle has no size " + shown(wanted) + "; it has " + listed +
                                  ". Export it again with --size " + shown(wanted) + " as well.");
  }
  std::stable_sort(found.begin(), found.end(), [](const Shape* a, const Shape* b) { return a->batch < b->batch; });
  return found;
}

}  // namespace tgate
