// Attention of one head, forward and backward, written once and compiled once per instruction set.
//
// How it is included: attention_baseline.cpp, attention_avx2.cpp and attention_avx512.cpp include it once each, after
// they have defined, in an unnamed namespace inside fastmae, the vectors Float and Bits (kLanes 32-bit numbers), the
// functions broadcast and larger, and the tile of a product that the registers hold (kTileRows × kTileVectors vectors).
// No other file may include it, so it has no include guard on purpose. attention_table() at the end makes the functions
// known to instruction_set.cpp.
//
// Multiplications and additions are fused where the instruction set can do that, so here, unlike in loops.h, the bits
// differ between instruction sets. As in loops.h, nothing may have external linkage; the one #include has none either.
//
// Scores are transposed: one row per key, with the queries side by side in the lanes. Maxima and sums over keys then
// take whole vectors, and so do all products; only the last vector of queries can be incomplete.

#include "turn.h"

namespace fastmae {
namespace {

// The number of queries at a time: their scores, and what is computed from them, fit into the nearest caches.
constexpr std::int64_t kQueries = 32;

inline Float load(const float* p) {
  Float x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

// e^x with a relative error of 2e-7 for x from -87 to the largest that float32 can hold; 0 below. NaN stays NaN.
inline Float exponential(Float x) {
  // Adding 1.5·2^23 leaves no bits for a fraction: the whole number is in the low bits.
  const Float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  // ln 2 is split in two parts, the first short enough for an exact product. |r| ≤ ln 2 / 2.
  const Float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  // (e^r - 1 - r) / r² as a polynomial fitted at Chebyshev's points; its error is 1e-8 of e^r.
  Float y = r * 0x1.6d444ep-10f + 0x1.120c68p-7f;
  y = y * r + 0x1.5554e8p-5f;
  y = y * r + 0x1.5554dcp-3f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Bits exponent = (reinterpret_cast<Bits>(shifted) << 23) + 0x3F800000;
  return x < broadcast(-87.0f) ? broadcast(0.0f) : y * reinterpret_cast<Float>(exponent);
}

// A factor of a product that is read number by number, so that it may be transposed.
struct Factor {
  const float* numbers;
  std::int64_t row, column;
};

// Computes rows × vectors of c = a · b, or of c += a · b; b and c have rows of vectors.
template <int rows, int vectors>
inline void tile(Factor a, const float* b, std::int64_t b_row, std::int64_t depth, bool add, float* c,
                 std::int64_t c_row) {
  Float sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * kLanes) : broadcast(0.0f);
  for (std::int64_t k = 0; k < depth; ++k) {
    Float from_b[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) from_b[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Float from_a = broadcast(a.numbers[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += from_a * from_b[j];
    }
    a.numbers += a.column;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

// Calls the tile of so many rows; their number must be known when it is compiled.
template <int vectors, int most = kTileRows>
inline void tile_of(std::int64_t rows, Factor a, const float* b, std::int64_t b_row, std::int64_t depth, bool add,
                    float* c, std::int64_t c_row) {
  if constexpr (most > 1) {
    if (rows < most) return tile_of<vectors, most - 1>(rows, a, b, b_row, depth, add, c, c_row);
  }
  tile<most, vectors>(a, b, b_row, depth, add, c, c_row);
}

template <int vectors>
inline void panel(Factor a, std::int64_t rows, const float* b, std::int64_t b_row, std::int64_t depth, bool add,
                  float* c, std::int64_t c_row) {
  // Tiles have nearly equal heights: 13 rows are 7 and 6 instead of 8 and 5.
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (std::int64_t i = 0, first = 0; i < tiles; ++i) {
    const std::int64_t last = rows * (i + 1) / tiles;
    const Factor from = {a.numbers + first * a.row, a.row, a.column};
    tile_of<vectors>(last - first, from, b, b_row, depth, add, c + first * c_row, c_row);
    first = last;
  }
}

// c [rows, width] = a [rows, depth] · b [depth, width], or c += a · b. Widths are whole vectors.
void product(Factor a, std::int64_t rows, const float* b, std::int64_t b_row, std::int64_t depth, std::int64_t width,
             bool add, float* c, std::int64_t c_row) {
  std::int64_t i = 0;
  for (; i + kTileVectors * kLanes <= width; i += kTileVectors * kLanes)
    panel<kTileVectors>(a, rows, b + i, b_row, depth, add, c + i, c_row);
  for (; i < width; i += kLanes) panel<1>(a, rows, b + i, b_row, depth, add, c + i, c_row);
}

// Copies rows that lie from_row numbers apart to rows that lie to_row numbers apart.
void copy_rows(const float* from, std::int64_t from_row, std::int64_t rows, std::int64_t D, float* to,
               std::int64_t to_row) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < D; d += kLanes) store(to + r * to_row + d, load(from + r * from_row + d));
}

// to [D, kQueries] = factor · from [rows, D], transposed; the rest of the last vector is 0.
void transpose(const float* from, std::int64_t rows, std::int64_t D, float factor, float* to) {
  for (std::int64_t r = 0; r < rows || r % kLanes; r += 4)
    for (std::int64_t d = 0; d < D; d += 4) {
      Float4 x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = Float4{};
        if (r + i < rows) __builtin_memcpy(&x[i], from + (r + i) * D + d, sizeof x[i]);
        x[i] *= factor;
      }
      Float4 turned[4];
      turn(x, turned);
      for (int i = 0; i < 4; ++i) __builtin_memcpy(to + (d + i) * kQueries + r, &turned[i], sizeof(Float4));
    }
}

inline std::int64_t whole_vectors(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Hands out parts of the caller's memory, one after another.
struct Room {
  float* next;

  float* take(std::int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  }
};

std::int64_t room(AttentionShape shape, bool backward) {
  const std::int64_t S = shape.S, D = shape.D;
  return backward ? 4 * S * D + 2 * S * kQueries + 4 * kQueries * D : 2 * S * D + S * kQueries + 2 * kQueries * D;
}

// The maxima over the keys for one vector of queries, in four independent chains of instructions.
inline Float maxima(const float* scores, std::int64_t S) {
  Float most[4];
  for (int i = 0; i < 4; ++i) most[i] = load(scores);
  std::int64_t s = 0;
  for (; s + 4 <= S; s += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = larger(load(scores + (s + i) * kQueries), most[i]);
  for (; s < S; ++s) most[0] = larger(load(scores + s * kQueries), most[0]);
  return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

void attention_forward(AttentionHead<const float> head, AttentionShape shape, float* out, std::int64_t out_row,
                       float* lse, float* memory) {
  const std::int64_t S = shape.S, D = shape.D;
  Room room = {memory};
  float *k = room.take(S * D), *v = room.take(S * D), *scores = room.take(S * kQueries);
  float *q = room.take(kQueries * D), *q_turned = room.take(kQueries * D);
  copy_rows(head.k, head.k_row, S, D, k, D);
  copy_rows(head.v, head.v_row, S, D, v, D);
  for (std::int64_t t = 0; t < shape.T; t += kQueries) {
    const std::int64_t queries = shape.T - t < kQueries ? shape.T - t : kQueries, width = whole_vectors(queries);
    copy_rows(head.q + t * head.q_row, head.q_row, queries, D, q, D);
    transpose(q, queries, D, shape.scale, q_turned);
    product({k, D, 1}, S, q_turned, kQueries, D, width, false, scores, kQueries);
    float sums[kQueries], most[kQueries];
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const Float maximum = maxima(scores + i, S);
      Float sum = broadcast(0.0f);
      for (std::int64_t s = 0; s < S; ++s) {
        const Float weight = exponential(load(scores + s * kQueries + i) - maximum);
        store(scores + s * kQueries + i, weight);
        sum += weight;
      }
      store(sums + i, sum);
      store(most + i, maximum);
    }
    float* to = out + t * out_row;
    product({scores, 1, kQueries}, queries, v, D, S, D, false, to, out_row);
    for (std::int64_t i = 0; i < queries; ++i) {
      const Float factor = broadcast(1 / sums[i]);
      for (std::int64_t d = 0; d < D; d += kLanes) store(to + i * out_row + d, load(to + i * out_row + d) * factor);
      lse[t + i] = most[i] + __builtin_logf(sums[i]);
    }
  }
}

void attention_backward(AttentionHead<const float> head, AttentionShape shape, const float* grad,
                        std::int64_t grad_row, const float* lse, AttentionHead<float> to, float* memory) {
  const std::int64_t S = shape.S, D = shape.D;
  Room room = {memory};
  float *k = room.take(S * D), *v = room.take(S * D), *dk = room.take(S * D), *dv = room.take(S * D);
  float *weights = room.take(S * kQueries), *slopes = room.take(S * kQueries);
  float *q = room.take(kQueries * D), *q_turned = room.take(kQueries * D);
  float *g = room.take(kQueries * D), *g_turned = room.take(kQueries * D);
  copy_rows(head.k, head.k_row, S, D, k, D);
  copy_rows(head.v, head.v_row, S, D, v, D);
  for (std::int64_t t = 0; t < shape.T; t += kQueries) {
    const std::int64_t queries = shape.T - t < kQueries ? shape.T - t : kQueries, width = whole_vectors(queries);
    copy_rows(head.q + t * head.q_row, head.q_row, queries, D, q, D);
    copy_rows(grad + t * grad_row, grad_row, queries, D, g, D);
    transpose(q, queries, D, shape.scale, q_turned);
    // The scale is applied here, so that the slopes of the scores have it for both products, with queries and keys.
    transpose(g, queries, D, shape.scale, g_turned);
    product({k, D, 1}, S, q_turned, kQueries, D, width, false, weights, kQueries);
    product({v, D, 1}, S, g_turned, kQueries, D, width, false, slopes, kQueries);
    float normaliser[kQueries] = {};  // 0 for the rest of the last vector
    __builtin_memcpy(normaliser, lse + t, static_cast<std::size_t>(queries) * sizeof(float));
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const Float shift = load(normaliser + i);
      Float mean = broadcast(0.0f);
      for (std::int64_t s = 0; s < S; ++s) {
        const Float weight = exponential(load(weights + s * kQueries + i) - shift);
        store(weights + s * kQueries + i, weight);
        mean += weight * load(slopes + s * kQueries + i);
      }
      for (std::int64_t s = 0; s < S; ++s) {
        float* slope = slopes + s * kQueries + i;
        store(slope, load(weights + s * kQueries + i) * (load(slope) - mean));
      }
    }
    product({weights, kQueries, 1}, S, g, D, queries, D, t > 0, dv, D);
    product({slopes, kQueries, 1}, S, q, D, queries, D, t > 0, dk, D);
    product({slopes, 1, kQueries}, queries, k, D, S, D, false, to.q + t * to.q_row, to.q_row);
  }
  copy_rows(dk, D, S, D, to.k, to.k_row);
  copy_rows(dv, D, S, D, to.v, to.v_row);
}

constexpr AttentionKernels attention_table() { return {room, attention_forward, attention_backward}; }

}  // namespace
}  // namespace fastmae
