// Attention of one head, forward and backward, written once and compiled once per instruction set.
//
// How it is included: attention_baseline.cpp, attention_avx2.cpp, attention_avx512.cpp, attention_avx512bf16.cpp and
// attention_avx512amx.cpp include it once each, after they have defined, in an unnamed namespace inside fastmae, the
// vectors Float and Bits (kLanes 32-bit numbers), the functions broadcast and larger, and the tile of a product that the
// registers hold (kTileRows × kTileVectors vectors). No other file may include it, so it has no include guard on purpose.
// attention_kernels_of<Number, Products>() at the end makes the functions known to instruction_set.cpp.
//
// Number is what lies in the tensors: float, or Bfloat. Statistics and sums are float32 for both. Products says what is
// multiplied: Numbers, below, are float32 (a Bfloat becomes one when it is copied into a core's caches, which is done
// anyway); Pairs, of attention_avx512bf16.cpp, are two Bfloats, multiplied and added up by one instruction; Tiles, of
// tiles.h, are Pairs, multiplied in blocks of 16 × 16 cells. The cells of all matrices have 32 bits, one Number or one
// Pair, so that they share the code. Where two functions differ by the order "along" an axis, that is the axis of a pair;
// for single numbers both are the same. Rows and depths come in multiples of kWhole, filled up with zeros in the depth.
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

struct Bfloat {
  std::uint16_t bits;
};

typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Float load(const float* p) {
  Float x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

inline Float load(const Bfloat* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return reinterpret_cast<Float>(__builtin_convertvector(x, Bits) << 16);
}

// The nearest Bfloats, ties to even, in the upper halves; the lower halves are not cleared. NaN stays NaN.
inline Bits rounded(Float x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  return x == x ? bits + 0x7FFF + ((bits >> 16) & 1) : bits | 0x400000;
}

inline void store(Bfloat* p, Float x) {
  const Halves halves = __builtin_convertvector(rounded(x) >> 16, Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

// Products of single numbers.
struct Numbers {
  static constexpr int kTogether = 1, kWhole = 1;
  struct Session {};
  static Float add(Float sum, Float a, Float b) { return sum + a * b; }
};

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

// A factor of a product that is read cell by cell, so that it may be transposed.
struct Factor {
  const float* cells;
  std::int64_t row, column;
};

// Computes rows × vectors of c = a · b, or of c += a · b; b and c have rows of vectors. The depth is a number of cells.
template <class Products, int rows, int vectors>
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
      const Float from_a = broadcast(a.cells[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = Products::add(sums[i][j], from_a, from_b[j]);
    }
    a.cells += a.column;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

// Calls the tile of so many rows; their number must be known when it is compiled.
template <class Products, int vectors, int most = kTileRows>
inline void tile_of(std::int64_t rows, Factor a, const float* b, std::int64_t b_row, std::int64_t depth, bool add,
                    float* c, std::int64_t c_row) {
  if constexpr (most > 1) {
    if (rows < most) return tile_of<Products, vectors, most - 1>(rows, a, b, b_row, depth, add, c, c_row);
  }
  tile<Products, most, vectors>(a, b, b_row, depth, add, c, c_row);
}

template <class Products, int vectors>
inline void panel(Factor a, std::int64_t rows, const float* b, std::int64_t b_row, std::int64_t depth, bool add,
                  float* c, std::int64_t c_row) {
  // Tiles have nearly equal heights: 13 rows are 7 and 6 instead of 8 and 5.
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (std::int64_t i = 0, first = 0; i < tiles; ++i) {
    const std::int64_t last = rows * (i + 1) / tiles;
    const Factor from = {a.cells + first * a.row, a.row, a.column};
    tile_of<Products, vectors>(last - first, from, b, b_row, depth, add, c + first * c_row, c_row);
    first = last;
  }
}

// What rows are filled up to where only whole tiles are multiplied.
template <class Products>
constexpr std::int64_t whole(std::int64_t count) {
  return (count + Products::kWhole - 1) / Products::kWhole * Products::kWhole;
}

// c [rows, width] = a [rows, depth] · b [depth, width], or c += a · b. Widths are whole vectors. Whole tiles also write
// the rows that c is filled up with, and the cells of a row of their a lie side by side.
template <class Products>
void product(Factor a, std::int64_t rows, const float* b, std::int64_t b_row, std::int64_t depth, std::int64_t width,
             bool add, float* c, std::int64_t c_row) {
  if constexpr (Products::kWhole > 1) {
    Products::product(a.cells, a.row, whole<Products>(rows), b, b_row, depth, width, add, c, c_row);
  } else {
    std::int64_t i = 0;
    for (; i + kTileVectors * kLanes <= width; i += kTileVectors * kLanes)
      panel<Products, kTileVectors>(a, rows, b + i, b_row, depth, add, c + i, c_row);
    for (; i < width; i += kLanes) panel<Products, 1>(a, rows, b + i, b_row, depth, add, c + i, c_row);
  }
}

// Copies rows that lie from_row numbers apart to rows that lie to_row numbers apart.
template <class From, class To>
void copy_rows(const From* from, std::int64_t from_row, std::int64_t rows, std::int64_t D, To* to,
               std::int64_t to_row) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < D; d += kLanes) store(to + r * to_row + d, load(from + r * from_row + d));
}

// The number of cells that hold so many numbers.
template <class Products>
constexpr std::int64_t cells(std::int64_t numbers) {
  return whole<Products>((numbers + Products::kTogether - 1) / Products::kTogether);
}

// Fills whole vectors with zeros.
inline void clear(float* p, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(p + i, broadcast(0.0f));
}

// Two Bfloats in one cell, the first in the lower half, where its address is the lower too.
inline Float paired(Bits first, Bits second) {
  return reinterpret_cast<Float>((first >> 16) | (second & 0xFFFF0000));
}

// Rows of D numbers, ready to be multiplied along D (cells [rows, D / kTogether]) and along the rows (cells
// [rows / kTogether, D], the last ones filled up with zeros; turned, for whole tiles, the same as [D, rows / kTogether]).
struct Rows {
  float *along_D, *along_rows, *turned;
};

// Scores and what is computed from them, [keys, kQueries]: as numbers, and ready to be multiplied along the keys (cells
// [keys / kTogether, kQueries]) and along the queries (cells [keys, kQueries / kTogether]).
struct Scores {
  float *numbers, *along_keys, *along_queries;
};

template <class Products, class Number>
void lay_along_D(const Number* from, std::int64_t from_row, std::int64_t rows, std::int64_t D, float* to) {
  if constexpr (Products::kTogether == 1)
    copy_rows(from, from_row, rows, D, to, D);
  else
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = to + r * cells<Products>(D);
      __builtin_memcpy(row, from + r * from_row, static_cast<std::size_t>(D) * sizeof(Number));
      for (std::int64_t i = D / 2; i < cells<Products>(D); ++i) row[i] = 0;
    }
}

template <class Products, class Number>
void lay_along_rows(const Number* from, std::int64_t from_row, std::int64_t rows, std::int64_t D, float* to) {
  if constexpr (Products::kTogether == 1)
    copy_rows(from, from_row, rows, D, to, D);
  else
    for (std::int64_t r = 0; r < rows; r += 2)
      for (std::int64_t d = 0; d < D; d += kLanes) {
        const Number* p = from + r * from_row + d;
        const Float second = r + 1 < rows ? load(p + from_row) : broadcast(0.0f);
        store(to + r / 2 * D + d, paired(reinterpret_cast<Bits>(load(p)), reinterpret_cast<Bits>(second)));
      }
  const std::int64_t filled = (rows + Products::kTogether - 1) / Products::kTogether;
  clear(to + filled * D, (cells<Products>(rows) - filled) * D);
}

// Whole tiles are whole vectors, too.
template <class Products>
inline std::int64_t whole_vectors(std::int64_t count) {
  return whole<Products>((count + kLanes - 1) / kLanes * kLanes);
}

// to [columns, rows] = factor · from [rows, columns], transposed; the rest of the last vector, or tile, of rows is 0. The
// factor is for single numbers alone.
template <class Products>
void transpose(const float* from, std::int64_t from_row, std::int64_t rows, std::int64_t columns, float factor,
               float* to, std::int64_t to_row) {
  for (std::int64_t r = 0; r < whole_vectors<Products>(rows); r += 4)
    for (std::int64_t d = 0; d < columns; d += 4) {
      Float4 x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        x[i] = Float4{};
        if (r + i < rows) __builtin_memcpy(&x[i], from + (r + i) * from_row + d, sizeof x[i]);
        if constexpr (Products::kTogether == 1) x[i] *= factor;
      }
      Float4 turned[4];
      turn(x, turned);
      for (int i = 0; i < 4; ++i) __builtin_memcpy(to + (d + i) * to_row + r, &turned[i], sizeof(Float4));
    }
}

template <class Products, class Number>
void lay(const Number* from, std::int64_t from_row, std::int64_t rows, std::int64_t D, Rows to) {
  lay_along_D<Products>(from, from_row, rows, D, to.along_D);
  if constexpr (Products::kTogether > 1) lay_along_rows<Products>(from, from_row, rows, D, to.along_rows);
}

// to [queries, D] = the numbers that lie along the keys [keys, queries], transposed, times rows [keys, D].
template <class Products>
void product_over_keys(Scores scores, Rows rows, std::int64_t queries, std::int64_t S, std::int64_t D, float* turned,
                       float* to) {
  const std::int64_t S_cells = cells<Products>(S), width = whole_vectors<Products>(queries);
  if constexpr (Products::kWhole > 1) {  // whose cells of the first factor must lie side by side
    product<Products>({rows.turned, S_cells, 1}, D, scores.along_keys, kQueries, S_cells, width, false, turned,
                      kQueries);
    transpose<Products>(turned, kQueries, D, width, 1, to, D);
  } else {
    product<Products>({scores.along_keys, 1, kQueries}, queries, rows.along_rows, D, S_cells, D, false, to, D);
  }
}

template <class Products>
void turn_rows(Rows rows, std::int64_t count, std::int64_t D) {
  if constexpr (Products::kWhole > 1)
    transpose<Products>(rows.along_rows, D, cells<Products>(count), D, 1, rows.turned, cells<Products>(count));
}

// Scales what `transpose` could not, because the numbers of a pair have too few bits for it. Only differences of scores
// are scaled: a fused product and sum would round a score in another way than the largest one, and weights of 1 would
// no longer be 1. So for pairs lse is divided by the scale, as scores are.
template <class Products>
inline Float scaled(Float x, float scale) {
  if constexpr (Products::kTogether == 1) return x;
  return x * scale;
}

// Puts numbers of the keys s to s + kTogether - 1 and one vector of queries from i on.
template <class Products>
inline void put_along_keys(const Float (&x)[Products::kTogether], Scores to, std::int64_t s, std::int64_t i) {
  if constexpr (Products::kTogether == 1)
    store(to.along_keys + s * kQueries + i, x[0]);
  else
    store(to.along_keys + s / 2 * kQueries + i, paired(rounded(x[0]), rounded(x[1])));
}

// Puts numbers of the key s and one vector of queries from i on, if that is not the place of the numbers themselves.
template <class Products>
inline void put_along_queries(Float x, Scores to, std::int64_t s, std::int64_t i) {
  if constexpr (Products::kTogether > 1) store(reinterpret_cast<Bfloat*>(to.along_queries + s * kQueries / 2) + i, x);
}

// Hands out parts of the caller's memory, one after another, each aligned as the whole is.
struct Room {
  float* next;

  float* take(std::int64_t count) {
    float* taken = next;
    next += (count + 15) / 16 * 16;
    return taken;
  }

  template <class Products>
  Rows take_rows(std::int64_t rows, std::int64_t D, bool turned) {
    float* along_D = take(whole<Products>(rows) * cells<Products>(D));
    float* along_rows = Products::kTogether == 1 ? along_D : take(cells<Products>(rows) * D);
    return {along_D, along_rows, Products::kWhole > 1 && turned ? take(D * cells<Products>(rows)) : nullptr};
  }

  // What fills up the last tile of keys is 0.
  template <class Products>
  Scores take_scores(std::int64_t S) {
    float* numbers = take(whole<Products>(S + 1) * kQueries);
    if (Products::kTogether == 1) return {numbers, numbers, numbers};
    float* along_keys = take(cells<Products>(S) * kQueries);
    const std::int64_t filled = (S + 1) / 2;
    clear(along_keys + filled * kQueries, (cells<Products>(S) - filled) * kQueries);
    return {numbers, along_keys, take(whole<Products>(S + 1) * cells<Products>(kQueries))};
  }
};

// No less than what attention_forward or attention_backward take.
std::int64_t room(AttentionShape shape, bool backward) {
  // Whole tiles take the most: 16 rows of cells, which are 32 numbers along them.
  const std::int64_t S = (shape.S / 32 + 1) * 32, D = (shape.D + 31) / 32 * 32;
  const std::int64_t rows = S * D, queries = kQueries * D, scores = S * kQueries;
  constexpr std::int64_t alignments = 24 * 16;
  return (backward ? 4 * rows + 6 * queries + 4 * scores : 2 * rows + 4 * queries + 2 * scores) + alignments;
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

template <class Number, class Products>
void attention_forward(AttentionHead<const void> head, AttentionShape shape, void* out, std::int64_t out_row,
                       float* lse, float* memory) {
  const std::int64_t S = shape.S, D = shape.D, D_cells = cells<Products>(D);
  const Number *from_k = static_cast<const Number*>(head.k), *from_v = static_cast<const Number*>(head.v);
  [[maybe_unused]] const typename Products::Session session;
  Room room = {memory};
  float* k = room.take(whole<Products>(S) * D_cells);
  float* v_along_rows = room.take(cells<Products>(S) * D);
  const Rows v = {nullptr, v_along_rows, room.take(Products::kWhole > 1 ? D * cells<Products>(S) : 0)};
  float *q = room.take(kQueries * D_cells), *q_turned = room.take(kQueries * D_cells);
  float *sum = room.take(kQueries * D), *sum_turned = room.take(Products::kWhole > 1 ? kQueries * D : 0);
  const Scores scores = room.take_scores<Products>(S);
  const float unit = Products::kTogether == 1 ? 1.0f : 1 / shape.scale;  // see scaled
  lay_along_D<Products>(from_k, head.k_row, S, D, k);
  lay_along_rows<Products>(from_v, head.v_row, S, D, v.along_rows);
  turn_rows<Products>(v, S, D);
  for (std::int64_t t = 0; t < shape.T; t += kQueries) {
    const std::int64_t queries = shape.T - t < kQueries ? shape.T - t : kQueries;
    const std::int64_t width = whole_vectors<Products>(queries);
    lay_along_D<Products>(static_cast<const Number*>(head.q) + t * head.q_row, head.q_row, queries, D, q);
    transpose<Products>(q, D_cells, queries, D_cells, shape.scale, q_turned, kQueries);
    product<Products>({k, D_cells, 1}, S, q_turned, kQueries, D_cells, width, false, scores.numbers, kQueries);
    // What fills up the last pair gets the weight 0.
    for (std::int64_t i = 0; S % Products::kTogether && i < width; i += kLanes)
      store(scores.numbers + S * kQueries + i, broadcast(-__builtin_inff()));
    float sums[kQueries], most[kQueries];
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const Float maximum = maxima(scores.numbers + i, S);
      Float total = broadcast(0.0f);
      for (std::int64_t s = 0; s < S; s += Products::kTogether) {
        Float weights[Products::kTogether];
        for (int j = 0; j < Products::kTogether; ++j) {
          const Float score = load(scores.numbers + (s + j) * kQueries + i);
          weights[j] = exponential(scaled<Products>(score - maximum, shape.scale));
          total += weights[j];
        }
        put_along_keys<Products>(weights, scores, s, i);
      }
      store(sums + i, total);
      store(most + i, maximum);
    }
    product_over_keys<Products>(scores, v, queries, S, D, sum_turned, sum);
    Number* to = static_cast<Number*>(out) + t * out_row;
    for (std::int64_t i = 0; i < queries; ++i) {
      const Float factor = broadcast(1 / sums[i]);
      for (std::int64_t d = 0; d < D; d += kLanes) store(to + i * out_row + d, load(sum + i * D + d) * factor);
      lse[t + i] = most[i] + __builtin_logf(sums[i]) * unit;
    }
  }
}

template <class Number, class Products>
void attention_backward(AttentionHead<const void> head, AttentionShape shape, const void* grad, std::int64_t grad_row,
                        const float* lse, AttentionHead<void> to, float* memory) {
  const std::int64_t S = shape.S, D = shape.D, D_cells = cells<Products>(D);
  const Number *from_k = static_cast<const Number*>(head.k), *from_v = static_cast<const Number*>(head.v);
  [[maybe_unused]] const typename Products::Session session;
  Room room = {memory};
  const Rows k = room.take_rows<Products>(S, D, true);
  float* v = room.take(whole<Products>(S) * D_cells);
  float *dk = room.take(whole<Products>(S) * D), *dv = room.take(whole<Products>(S) * D);
  const Rows q = room.take_rows<Products>(kQueries, D, false), g = room.take_rows<Products>(kQueries, D, false);
  float *q_turned = room.take(kQueries * D_cells), *g_turned = room.take(kQueries * D_cells);
  float *dq = room.take(kQueries * D), *dq_turned = room.take(Products::kWhole > 1 ? kQueries * D : 0);
  const Scores weights = room.take_scores<Products>(S), slopes = room.take_scores<Products>(S);
  lay<Products>(from_k, head.k_row, S, D, k);
  turn_rows<Products>(k, S, D);
  lay_along_D<Products>(from_v, head.v_row, S, D, v);
  for (std::int64_t t = 0; t < shape.T; t += kQueries) {
    const std::int64_t queries = shape.T - t < kQueries ? shape.T - t : kQueries;
    const std::int64_t width = whole_vectors<Products>(queries);
    lay<Products>(static_cast<const Number*>(head.q) + t * head.q_row, head.q_row, queries, D, q);
    lay<Products>(static_cast<const Number*>(grad) + t * grad_row, grad_row, queries, D, g);
    transpose<Products>(q.along_D, D_cells, queries, D_cells, shape.scale, q_turned, kQueries);
    // The scale is applied here, so that the slopes of the scores have it for both products, with queries and keys.
    transpose<Products>(g.along_D, D_cells, queries, D_cells, shape.scale, g_turned, kQueries);
    product<Products>({k.along_D, D_cells, 1}, S, q_turned, kQueries, D_cells, width, false, weights.numbers, kQueries);
    product<Products>({v, D_cells, 1}, S, g_turned, kQueries, D_cells, width, false, slopes.numbers, kQueries);
    // What fills up the last pair has neither a weight nor a slope.
    for (std::int64_t i = 0; S % Products::kTogether && i < width; i += kLanes) {
      store(weights.numbers + S * kQueries + i, broadcast(0.0f));
      store(slopes.numbers + S * kQueries + i, broadcast(0.0f));
    }
    float normaliser[kQueries] = {};  // 0 for the rest of the last vector
    __builtin_memcpy(normaliser, lse + t, static_cast<std::size_t>(queries) * sizeof(float));
    for (std::int64_t i = 0; i < width; i += kLanes) {
      const Float shift = load(normaliser + i);
      Float mean = broadcast(0.0f);
      for (std::int64_t s = 0; s < S; ++s) {
        const Float score = load(weights.numbers + s * kQueries + i);
        const Float weight = exponential(scaled<Products>(score - shift, shape.scale));
        store(weights.numbers + s * kQueries + i, weight);
        put_along_queries<Products>(weight, weights, s, i);
        mean += weight * load(slopes.numbers + s * kQueries + i);
      }
      for (std::int64_t s = 0; s < S; s += Products::kTogether) {
        Float slope[Products::kTogether];
        for (int j = 0; j < Products::kTogether; ++j) {
          const std::int64_t at = (s + j) * kQueries + i;
          const Float centred = load(slopes.numbers + at) - mean;
          slope[j] = scaled<Products>(load(weights.numbers + at) * centred, shape.scale);
          put_along_queries<Products>(slope[j], slopes, s + j, i);
        }
        put_along_keys<Products>(slope, slopes, s, i);
      }
    }
    // Nor has what fills up the last tile of queries.
    for (std::int64_t i = width; i < Products::kWhole * Products::kTogether; i += kLanes)
      for (std::int64_t s = 0; s < S; ++s) {
        put_along_queries<Products>(broadcast(0.0f), weights, s, i);
        put_along_queries<Products>(broadcast(0.0f), slopes, s, i);
      }
    const std::int64_t depth = cells<Products>(queries), row = cells<Products>(kQueries);
    product<Products>({weights.along_queries, row, 1}, S, g.along_rows, D, depth, D, t > 0, dv, D);
    product<Products>({slopes.along_queries, row, 1}, S, q.along_rows, D, depth, D, t > 0, dk, D);
    product_over_keys<Products>(slopes, k, queries, S, D, dq_turned, dq);
    copy_rows(dq, D, queries, D, static_cast<Number*>(to.q) + t * to.q_row, to.q_row);
  }
  copy_rows(dk, D, S, D, static_cast<Number*>(to.k), to.k_row);
  copy_rows(dv, D, S, D, static_cast<Number*>(to.v), to.v_row);
}

template <class Number, class Products>
constexpr AttentionKernels attention_kernels_of() {
  return {room, attention_forward<Number, Products>, attention_backward<Number, Products>};
}

}  // namespace
}  // namespace fastmae
