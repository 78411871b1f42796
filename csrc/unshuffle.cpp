// unshuffle: bytes that lie by their place in a number, as HDF5's shuffle filter stores them, put back into numbers.
// Equivalent to data.T.copy(); the definition is in fastmae/data/codecs.py.
#include <cstring>

#include "ops.h"

namespace fastmae {
namespace {

// B is known to the compiler, which then interleaves whole vectors.
template <int B>
void interleave(const char* __restrict data, std::int64_t count, char* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i)
    for (int b = 0; b < B; ++b) out[i * B + b] = data[b * count + i];
}

}  // namespace

void unshuffle(const Array& data, const Array& out) {
  const std::int64_t bytes = data.shape[0], count = data.shape[1];
  switch (bytes) {
    case 1: std::memcpy(out.data, data.data, static_cast<std::size_t>(count)); return;
    case 2: return interleave<2>(data.data, count, out.data);
    case 4: return interleave<4>(data.data, count, out.data);
    case 8: return interleave<8>(data.data, count, out.data);
    default:
      for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t b = 0; b < bytes; ++b) out.data[i * bytes + b] = data.data[b * count + i];
  }
}

}  // namespace fastmae
