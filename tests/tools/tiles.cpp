// Checks csrc/tiles.h by itself, for tests/ops/test_tiles.py: `tiles CASE` does one case and prints what came out.
//   dot R P C   reads a tile of R × P pairs of bfloat16, one of P × C pairs and one of R × C float32 from the standard
//               input, and writes the last one with the product of the first two added to it, as emulated.
//   amx R P C   the same by the processor; ends with 3 if it has no AMX or may not use it.
//   fault NAME  does what a processor would refuse, and prints the words of the refusal.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastmae {
[[noreturn]] void tile_fault(const char* what) { throw std::logic_error(what); }
}  // namespace fastmae

#include "tiles.h"

#include "amx.h"

namespace fastmae {
namespace {

std::uint32_t a[16][16], b[16][16], c[16][16];

template <class Unit>
int multiply(std::uint8_t rows, std::uint8_t pairs, std::uint8_t columns) {
  for (auto* tile : {a, b, c})
    if (std::fread(tile, sizeof a, 1, stdin) != 1) return 2;
  TileConfig config = {};
  config.palette = 1;
  const auto has = [&](int tile, std::uint8_t of_rows, int cells) {
    config.rows[tile] = of_rows;
    config.row_bytes[tile] = static_cast<std::uint16_t>(4 * cells);
  };
  has(2, rows, columns), has(5, rows, pairs), has(7, pairs, columns);
  Unit::configure(config);
  Unit::template load<2>(c, sizeof c[0]);
  Unit::template load<5>(a, sizeof a[0]);
  Unit::template load<7>(b, sizeof b[0]);
  Unit::template dot<2, 5, 7>();
  Unit::template store<2>(c, sizeof c[0]);
  Unit::release();
  return std::fwrite(c, sizeof c, 1, stdout) == 1 ? 0 : 2;
}

// Whole tiles of attention's own code, so that its machine code can be looked at.
[[maybe_unused]] void product(std::int64_t rows, std::int64_t depth) {
  static float cells[3][48][64];
  const Tiles<AmxTiles>::Session session;
  Tiles<AmxTiles>::product(cells[0][0], 64, rows, cells[1][0], 64, depth, 32, false, cells[2][0], 64);
}

void fault(const std::string& name) {
  using E = EmulatedTiles;
  TileConfig config = kWholeTiles;
  if (name == "unconfigured") return E::zero<0>();
  if (name == "palette") config.palette = 2;
  if (name == "reserved") config.reserved[13] = 1;
  if (name == "rows") config.rows[3] = 17;
  if (name == "bytes") config.row_bytes[3] = 65;
  if (name == "half") config.rows[3] = 0;
  if (name == "ninth") config.rows[8] = 1, config.row_bytes[8] = 4;
  if (name == "fit") config.rows[6] = 15;
  if (name == "part") config.row_bytes[4] = 62;
  if (name == "missing") config.rows[6] = 0, config.row_bytes[6] = 0;
  E::configure(config);
  E::dot<0, 4, 6>();
  if (name == "released") E::release(), E::dot<0, 4, 6>();
}

bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace
}  // namespace fastmae

int main(int count, char** words) {
  const std::string what = words[1];
  const auto number = [&](int i) { return static_cast<std::uint8_t>(std::atoi(words[i])); };
  if (what == "code" && count > 3) fastmae::product(number(2), number(3));
  if (what == "dot") return fastmae::multiply<fastmae::EmulatedTiles>(number(2), number(3), number(4));
  if (what == "amx" && !fastmae::may_use_tiles()) return 3;
  if (what == "amx") return fastmae::multiply<fastmae::AmxTiles>(number(2), number(3), number(4));
  try {
    fastmae::fault(words[2]);
  } catch (const std::logic_error& error) {
    std::printf("%s", error.what());
  }
  return 0;
}
