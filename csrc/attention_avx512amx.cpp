// Attention of bfloat16 for x86-64 processors with AMX, which multiplies tiles of 16 × 32 numbers at a time and adds up
// in float32; all else is AVX-512. And the same with emulated tiles, for tests on processors without AMX.
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

#include "tiles.h"

#include "amx.h"
#include "attention_loops.h"

namespace fastmae {
extern const AttentionKernels kAttentionAmx = attention_kernels_of<Bfloat, Tiles<AmxTiles>>();
extern const AttentionKernels kAttentionAvx512Emulated = attention_kernels_of<Bfloat, Tiles<EmulatedTiles>>();
}
