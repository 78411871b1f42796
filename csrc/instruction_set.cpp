// Asks the processor what it can do, once, and keeps the choice of the inner loops.
#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

#ifdef FASTMAE_X86_64
#include <cpuid.h>
#endif

namespace fastmae {

extern const Kernels kBaseline;
#ifdef FASTMAE_X86_64
extern const Kernels kAvx2, kAvx512;
#endif

namespace {

std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found = {&kBaseline};
#ifdef FASTMAE_X86_64
  // The builtin asks the operating system too; not every compiler lets it be asked for F16C.
  unsigned a, b, c = 0, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  if (has_f16c && __builtin_cpu_supports("avx2")) {
    found.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.push_back(&kAvx512);
  }
#endif
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> found = find_supported();
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{supported().back()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.push_back(table->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const Kernels* table : supported()) {
    if (name == table->name) return chosen().store(table);
    known += (known.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("instruction set must be one of " + known + ", got " + name);
}

}  // namespace fastmae
