// Products of bfloat16 in tiles (Intel AMX), over a small set of operations on tiles that has two implementations: the
// processor's instructions, in attention_avx512amx.cpp, and EmulatedTiles, below, with which tests prove layouts and
// indices on every processor.
//
// How it is included: attention_baseline.cpp and attention_avx512amx.cpp include it between kernels.h and
// attention_loops.h. It is compiled for several instruction sets, so, as turn.h, it has no #include of its own and nothing
// with external linkage. EmulatedTiles calls fastmae::tile_fault for what would end a program.
#pragma once

namespace fastmae {

namespace {

// What the instruction that configures tiles reads: 64 bytes. A tile has up to 16 rows of up to 64 bytes.
struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];  // of 8 tiles; the others must be 0
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

constexpr int kTiles = 8, kTileSide = 16;  // rows of a tile, and its 32-bit cells in a row
constexpr std::int64_t kTileSize = kTileSide * kTileSide;

// All tiles whole, of 16 × 16 cells: what matrices lack at their ends is filled up in memory.
constexpr TileConfig kWholeTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The instructions as Intel documents them (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TILERELEASE, TDPBF16PS), with their faults. One thread has one set of tiles, as a processor's core has.
class EmulatedTiles {
 public:
  static void configure(const TileConfig& config) {
    if (config.palette == 0) return release();
    bool is_wrong = config.palette > 1;
    for (const std::uint8_t byte : config.reserved) is_wrong |= byte != 0;
    for (int t = 0; t < 16; ++t) {
      const bool exists = t < kTiles;
      is_wrong |= config.row_bytes[t] > (exists ? 64 : 0) || config.rows[t] > (exists ? 16 : 0);
      is_wrong |= (config.row_bytes[t] == 0) != (config.rows[t] == 0);
    }
    if (is_wrong) tile_fault("a wrong configuration of tiles");
    if (config.start_row != 0) tile_fault("tiles that were interrupted, which are not emulated");
    state() = {config, {}};
  }

  static void release() { state() = {}; }

  template <int t>
  static void load(const void* from, std::int64_t stride) {
    Tile& tile = configured(t);
    tile = {};
    for (int r = 0; r < rows(t); ++r)
      __builtin_memcpy(tile.cells[r], static_cast<const char*>(from) + r * stride, row_bytes(t));
  }

  template <int t>
  static void store(void* to, std::int64_t stride) {
    const Tile& tile = configured(t);
    for (int r = 0; r < rows(t); ++r)
      __builtin_memcpy(static_cast<char*>(to) + r * stride, tile.cells[r], row_bytes(t));
  }

  template <int t>
  static void zero() {
    configured(t) = {};
  }

  // c += a · b: a [rows of c, pairs], b [pairs, columns of c], pairs of bfloat16; c float32.
  template <int c, int a, int b>
  static void dot() {
    static_assert(c != a && c != b && a != b, "the three tiles must differ");
    Tile &sum = configured(c), &left = configured(a), &right = configured(b);
    const int pairs = row_bytes(a) / 4, columns = row_bytes(c) / 4;
    if (row_bytes(a) % 4 || row_bytes(b) % 4 || row_bytes(c) % 4) tile_fault("tiles with a part of a cell");
    if (rows(c) != rows(a) || row_bytes(c) != row_bytes(b) || rows(b) != pairs)
      tile_fault("tiles that do not fit together");
    for (int m = 0; m < rows(c); ++m)
      for (int n = 0; n < columns; ++n) {
        // The first numbers of the pairs are added up, and the second ones, each by fused multiply-adds.
        float first = 0, second = 0;
        for (int k = 0; k < pairs; ++k) {
          const std::uint32_t x = left.cells[m][k], y = right.cells[k][n];
          first = flushed(__builtin_fmaf(flushed(from_bits(x << 16)), flushed(from_bits(y << 16)), first));
          second = flushed(__builtin_fmaf(flushed(from_bits(x & 0xFFFF0000)), flushed(from_bits(y & 0xFFFF0000)),
                                          second));
        }
        const float before = flushed(from_bits(sum.cells[m][n])), both = flushed(first + second);
        sum.cells[m][n] = bits_of(flushed(before + both));
      }
  }

 private:
  struct Tile {
    std::uint32_t cells[kTileSide][kTileSide];
  };
  struct State {
    TileConfig config;
    Tile tiles[kTiles];
  };

  static State& state() {
    static thread_local State of_this_thread;
    return of_this_thread;
  }
  static int rows(int t) { return state().config.rows[t]; }
  static int row_bytes(int t) { return state().config.row_bytes[t]; }
  static Tile& configured(int t) {
    if (state().config.palette == 0 || rows(t) == 0) tile_fault("a tile that is not configured");
    return state().tiles[t];
  }

  static float from_bits(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
  static std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  // Subnormal numbers count as 0, whatever the thread's mode is.
  static float flushed(float x) {
    const std::uint32_t bits = bits_of(x);
    return bits & 0x7F800000 ? x : from_bits(bits & 0x80000000);
  }
};

// For attention_loops.h: pairs of bfloat16, multiplied in tiles by Unit, which has the functions of EmulatedTiles.
template <class Unit>
struct Tiles {
  static constexpr int kTogether = 2, kWhole = kTileSide;

  // Tiles belong to a thread only while it multiplies: what they hold would be saved whenever the thread is interrupted.
  struct Session {
    Session() { Unit::configure(kWholeTiles); }
    ~Session() { Unit::release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // c [rows, width] = a [rows, depth] · b [depth, width], or c += a · b. All three numbers of cells are whole tiles; the
  // cells of a row lie side by side.
  static void product(const float* a, std::int64_t a_row, std::int64_t rows, const float* b, std::int64_t b_row,
                      std::int64_t depth, std::int64_t width, bool add, float* c, std::int64_t c_row) {
    // Two by two tiles of c at a time: so each tile that is loaded is multiplied twice.
    for (std::int64_t i = 0; i < rows; i += 2 * kTileSide)
      for (std::int64_t j = 0; j < width; j += 2 * kTileSide) {
        const float *from_a = a + i * a_row, *from_b = b + j;
        float* to = c + i * c_row + j;
        const bool is_tall = rows - i > kTileSide, is_wide = width - j > kTileSide;
        if (is_tall && is_wide)
          block<2, 2>(from_a, a_row, from_b, b_row, depth, add, to, c_row);
        else if (is_tall)
          block<2, 1>(from_a, a_row, from_b, b_row, depth, add, to, c_row);
        else if (is_wide)
          block<1, 2>(from_a, a_row, from_b, b_row, depth, add, to, c_row);
        else
          block<1, 1>(from_a, a_row, from_b, b_row, depth, add, to, c_row);
      }
  }

 private:
  // Tiles 0 to 3 hold c, 4 and 5 a, 6 and 7 b.
  template <int tall, int wide>
  static void block(const float* a, std::int64_t a_row, const float* b, std::int64_t b_row, std::int64_t depth,
                    bool add, float* c, std::int64_t c_row) {
    constexpr std::int64_t cell = sizeof(float);
    if (add) {
      Unit::template load<0>(c, c_row * cell);
      if constexpr (wide > 1) Unit::template load<1>(c + kTileSide, c_row * cell);
      if constexpr (tall > 1) Unit::template load<2>(c + kTileSide * c_row, c_row * cell);
      if constexpr (tall > 1 && wide > 1) Unit::template load<3>(c + kTileSide * c_row + kTileSide, c_row * cell);
    } else {
      Unit::template zero<0>();
      if constexpr (wide > 1) Unit::template zero<1>();
      if constexpr (tall > 1) Unit::template zero<2>();
      if constexpr (tall > 1 && wide > 1) Unit::template zero<3>();
    }
    for (std::int64_t k = 0; k < depth; k += kTileSide) {
      Unit::template load<4>(a + k, a_row * cell);
      Unit::template load<6>(b + k * b_row, b_row * cell);
      Unit::template dot<0, 4, 6>();
      if constexpr (wide > 1) {
        Unit::template load<7>(b + k * b_row + kTileSide, b_row * cell);
        Unit::template dot<1, 4, 7>();
      }
      if constexpr (tall > 1) {
        Unit::template load<5>(a + kTileSide * a_row + k, a_row * cell);
        Unit::template dot<2, 5, 6>();
      }
      if constexpr (tall > 1 && wide > 1) Unit::template dot<3, 5, 7>();
    }
    Unit::template store<0>(c, c_row * cell);
    if constexpr (wide > 1) Unit::template store<1>(c + kTileSide, c_row * cell);
    if constexpr (tall > 1) Unit::template store<2>(c + kTileSide * c_row, c_row * cell);
    if constexpr (tall > 1 && wide > 1) Unit::template store<3>(c + kTileSide * c_row + kTileSide, c_row * cell);
  }
};

}  // namespace
}  // namespace fastmae
