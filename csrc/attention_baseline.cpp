// Attention for every processor; see isa_baseline.cpp.
#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
typedef float Float __attribute__((vector_size(16)));
typedef std::uint32_t Bits __attribute__((vector_size(16)));

inline Float broadcast(float x) { return Float{x, x, x, x}; }
// The larger one; the second one if either is NaN.
inline Float larger(Float a, Float b) { return a > b ? a : b; }

}  // namespace
}  // namespace fastmae

#include "tiles.h"

#include "attention_loops.h"

namespace fastmae {
extern const AttentionLoops kAttentionBaseline = {attention_kernels_of<float, Numbers>(),
                                               attention_kernels_of<Bfloat, Numbers>()};
extern const AttentionKernels kAttentionEmulated = attention_kernels_of<Bfloat, Tiles<EmulatedTiles>>();
}
