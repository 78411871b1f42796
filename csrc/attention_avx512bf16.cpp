// Attention of bfloat16 for x86-64 processors with AVX512-BF16, which multiplies two numbers at a time and adds up in
// float32. On some processors that is twice as fast as attention_avx512.cpp, on others half as fast.
#include <immintrin.h>

#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 2;
typedef float Float __attribute__((vector_size(64)));
typedef std::uint32_t Bits __attribute__((vector_size(64)));

inline Float broadcast(float x) { return _mm512_set1_ps(x); }
// The larger one; the second one if either is NaN.
inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }

// Products of two numbers at a time. Subnormal numbers count as 0.
struct Pairs {
  static constexpr int kTogether = 2, kWhole = 1;
  struct Session {};
  static Float add(Float sum, Float a, Float b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

}  // namespace
}  // namespace fastmae

#include "attention_loops.h"

namespace fastmae {
extern const AttentionKernels kAttentionAvx512Bf16 = attention_kernels_of<Bfloat, Pairs>();
}
