// Transposes four rows of four numbers.
//
// How it is included: attention_loops.h and transpose.cpp include it, after <cstdint>. It is compiled for every
// instruction set, so it has no #include of its own and nothing with external linkage (see loops.h). Unlike loops.h it
// is an ordinary header: it needs nothing from the including file but <cstdint>, so #pragma once is right here.
#pragma once

namespace fastmae {
namespace {

// Four numbers; every processor has vectors of this length.
typedef float Float4 __attribute__((vector_size(16)));

// Picks four of the eight numbers of two vectors.
#if defined(__clang__)
#define FASTMAE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef std::int32_t Int4 __attribute__((vector_size(16)));
#define FASTMAE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int4{__VA_ARGS__})
#endif

inline void turn(const Float4 (&rows)[4], Float4 (&columns)[4]) {
  const Float4 low01 = FASTMAE_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
  const Float4 high01 = FASTMAE_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
  const Float4 low23 = FASTMAE_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Float4 high23 = FASTMAE_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  columns[0] = FASTMAE_SHUFFLE(low01, low23, 0, 1, 4, 5);
  columns[1] = FASTMAE_SHUFFLE(low01, low23, 2, 3, 6, 7);
  columns[2] = FASTMAE_SHUFFLE(high01, high23, 0, 1, 4, 5);
  columns[3] = FASTMAE_SHUFFLE(high01, high23, 2, 3, 6, 7);
}

#undef FASTMAE_SHUFFLE

}  // namespace
}  // namespace fastmae
