// Attention for x86-64 processors with AVX2 and FMA; see isa_avx2.cpp.
#include <immintrin.h>

#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
typedef float Float __attribute__((vector_size(32)));
typedef std::uint32_t Bits __attribute__((vector_size(32)));

inline Float broadcast(float x) { return _mm256_set1_ps(x); }
// The larger one; the second one if either is NaN.
inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }

}  // namespace
}  // namespace fastmae

#include "attention_loops.h"

namespace fastmae {
extern const AttentionLoops kAttentionAvx2 = {attention_kernels_of<float, Numbers>(),
                                               attention_kernels_of<Bfloat, Numbers>()};
}
