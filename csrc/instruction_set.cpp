// Asks the processor once which instruction sets it has, and holds the choice of the inner loops.
#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

#ifdef FASTMAE_X86_64
#include <cpuid.h>
#endif

namespace fastmae {

extern const Kernels kBaseline;
extern const AttentionLoops kAttentionBaseline;
#ifdef FASTMAE_X86_64
extern const Kernels kAvx2, kAvx512;
extern const AttentionLoops kAttentionAvx2, kAttentionAvx512;
extern const AttentionKernels kAttentionAvx512Bf16;
#endif

namespace {

struct Loops {
  const Kernels* ops;
  const AttentionLoops* attention;
  const AttentionKernels* dots;  // attention of bfloat16 by dot products, or null
};

const Loops kBaselineLoops = {&kBaseline, &kAttentionBaseline, nullptr};
#ifdef FASTMAE_X86_64
const Loops kAvx2Loops = {&kAvx2, &kAttentionAvx2, nullptr};
const Loops kAvx512Loops = {&kAvx512, &kAttentionAvx512, nullptr};
const Loops kAvx512LoopsWithDots = {&kAvx512, &kAttentionAvx512, &kAttentionAvx512Bf16};

// Not every compiler knows AVX512-BF16 in the builtin that the others are asked of.
bool has_bf16_dots() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

std::vector<const Loops*> find_supported() {
  std::vector<const Loops*> found = {&kBaselineLoops};
#ifdef FASTMAE_X86_64
  // The builtin asks the operating system too. Not every compiler knows F16C in it, so that is asked of the processor.
  unsigned a, b, c = 0, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  if (has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2Loops);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found.push_back(has_bf16_dots() ? &kAvx512LoopsWithDots : &kAvx512Loops);
  }
#endif
  return found;
}

const std::vector<const Loops*>& supported() {
  static const std::vector<const Loops*> found = find_supported();
  return found;
}

std::atomic<const Loops*>& chosen() {
  static std::atomic<const Loops*> loops{supported().back()};
  return loops;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->ops; }

const AttentionKernels& attention_kernels(DType dtype, bool dots) {
  const Loops& loops = *chosen().load(std::memory_order_relaxed);
  if (dots && loops.dots) return *loops.dots;
  return dtype == DType::kBfloat16 ? loops.attention->bfloat16 : loops.attention->float32;
}

bool attention_dots() { return chosen().load(std::memory_order_relaxed)->dots; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Loops* loops : supported()) names.push_back(loops->ops->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const Loops* loops : supported()) {
    if (name == loops->ops->name) return chosen().store(loops);
    known += (known.empty() ? "" : ", ") + std::string(loops->ops->name);
  }
  throw std::invalid_argument("instruction set must be one of " + known + ", got " + name);
}

}  // namespace fastmae
