// Attention for x86-64 processors with AVX-512 F, BW, VL and DQ; see isa_avx512.cpp.
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

}  // namespace
}  // namespace fastmae

#include "attention_loops.h"

namespace fastmae {
extern const AttentionLoops kAttentionAvx512 = {attention_kernels_of<float, Numbers>(),
                                               attention_kernels_of<Bfloat, Numbers>()};
}
