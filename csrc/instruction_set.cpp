// Asks the processor once which instruction sets it has, and holds the choice of the inner loops.
#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

#ifdef FASTMAE_X86_64
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastmae {

extern const Kernels kBaseline;
extern const AttentionLoops kAttentionBaseline;
extern const AttentionKernels kAttentionEmulated;
#ifdef FASTMAE_X86_64
extern const Kernels kAvx2, kAvx512;
extern const AttentionLoops kAttentionAvx2, kAttentionAvx512;
extern const AttentionKernels kAttentionAvx512Bf16, kAttentionAmx, kAttentionAvx512Emulated;
#endif

namespace {

struct Loops {
  const Kernels* ops;
  const AttentionLoops* attention;
  const AttentionKernels *dots, *tiles;  // attention of bfloat16 by these, or null: not all processors have them
  const AttentionKernels* emulated_tiles;
};

const Loops kBaselineLoops = {&kBaseline, &kAttentionBaseline, nullptr, nullptr, &kAttentionEmulated};
#ifdef FASTMAE_X86_64
const Loops kAvx2Loops = {&kAvx2, &kAttentionAvx2, nullptr, nullptr, &kAttentionEmulated};
const Loops kAvx512Loops = {&kAvx512, &kAttentionAvx512, &kAttentionAvx512Bf16, &kAttentionAmx,
                            &kAttentionAvx512Emulated};

// Not every compiler knows AVX512-BF16 and AMX in the builtin that the others are asked of.
bool has_bf16_dots() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// The processor has AMX-TILE and AMX-BF16, the kernel saves tiles (XCR0), and grants them to this process.
bool ask_for_tiles() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
  if ((low & kTileConfig) == 0 || (low & kTileData) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kOfTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kOfTileData) == 0;
#else
  return false;
#endif
}
#endif

bool has_dots() {
#ifdef FASTMAE_X86_64
  static const bool found = has_bf16_dots();
  return found;
#else
  return false;
#endif
}

bool has_tiles() {
#ifdef FASTMAE_X86_64
  static const bool granted = ask_for_tiles();
  return granted;
#else
  return false;
#endif
}

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
      found.push_back(&kAvx512Loops);
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

const AttentionKernels* attention_kernels(DType dtype, Multiply by) {
  const Loops& loops = *chosen().load(std::memory_order_relaxed);
  if (dtype != DType::kBfloat16) return by == Multiply::kFloat32 ? &loops.attention->float32 : nullptr;
  switch (by) {
    case Multiply::kFloat32: return &loops.attention->bfloat16;
    case Multiply::kDots: return has_dots() ? loops.dots : nullptr;
    case Multiply::kTiles: return loops.tiles && has_tiles() ? loops.tiles : nullptr;
    case Multiply::kEmulatedTiles: return loops.emulated_tiles;
  }
  return nullptr;
}

std::vector<std::string> attention_products() {
  std::vector<std::string> names;
  for (const Multiply by : {Multiply::kFloat32, Multiply::kDots, Multiply::kTiles, Multiply::kEmulatedTiles})
    if (attention_kernels(DType::kBfloat16, by)) names.push_back(kMultiplyNames[static_cast<int>(by)]);
  return names;
}

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
