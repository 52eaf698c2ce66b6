// Collects what the checker finds in a launch.
#include <cstring>
#include <map>

#include "engine.h"

namespace sim {

namespace {

struct Finding {
  std::string text;
  unsigned repeats;
};

constexpr size_t KEPT = 8;  // kinds of findings are told apart by kind and instruction
std::map<std::pair<std::string, unsigned>, size_t> index_of;
std::vector<Finding> findings;
size_t dropped;
std::string text;

std::string triple(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

}  // namespace

void clear_report() {
  index_of.clear();
  findings.clear();
  dropped = 0;
}

bool has_findings() { return !findings.empty(); }

std::string source_line(unsigned line) {
  const Kernel& kernel = *engine.kernel;
  const Location* best = nullptr;
  for (unsigned i = 0; i < kernel.location_count; ++i)
    if (kernel.locations[i].ptx_line <= line) best = &kernel.locations[i];
  std::string ptx = "PTX line " + std::to_string(line);
  if (!best) return ptx;
  const char* file = kernel.files[best->file];
  const char* slash = strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(best->line) + " (" + ptx +
         ")";
}

std::string describe_thread() {
  std::string name = std::string("kernel ") + engine.kernel->name;
  if (const Fiber* fiber = engine.current)
    name += " block " + triple(fiber->context.block) + " thread " + triple(fiber->context.thread);
  return name;
}

void finding(const std::string& kind, const std::string& detail, unsigned line) {
  auto [entry, fresh] = index_of.try_emplace({kind, line}, findings.size());
  if (!fresh) {
    if (entry->second < findings.size()) ++findings[entry->second].repeats;
    return;
  }
  if (findings.size() == KEPT) {
    ++dropped;
    entry->second = KEPT;
    return;
  }
  std::string where = line ? " at " + source_line(line) : "";
  findings.push_back({kind + ": " + detail + "; " + describe_thread() + where, 1});
}

void fatal(const std::string& kind, const std::string& detail, unsigned line) {
  finding(kind, detail, line);
  engine.aborted = true;
  for (;;) suspend();
}

}  // namespace sim

using namespace sim;

extern "C" const char* sim_report() {
  text.clear();
  for (const Finding& finding : findings) {
    text += finding.text;
    if (finding.repeats > 1) text += " [" + std::to_string(finding.repeats) + " times]";
    text += "\n";
  }
  if (dropped) text += "and " + std::to_string(dropped) + " more\n";
  if (engine.seed)
    text += "(GPUSIM_SEED=" + std::to_string(engine.seed) + ", launch " +
            std::to_string(engine.launches) + " since it was set)\n";
  return text.c_str();
}
