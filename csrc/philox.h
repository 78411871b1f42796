// Philox4x32-10 (Salmon et al. 2011). The same bits as fastmae/philox.py, which says how counters are laid out.
#pragma once

#include <array>
#include <cstdint>

namespace fastmae {

constexpr std::uint32_t kStreamMask = 0;

using PhiloxBlock = std::array<std::uint32_t, 4>;

inline PhiloxBlock philox(std::uint32_t block, std::uint32_t stream, std::uint64_t id, std::uint64_t seed) {
  std::uint32_t c0 = block, c1 = stream;
  std::uint32_t c2 = static_cast<std::uint32_t>(id), c3 = static_cast<std::uint32_t>(id >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace fastmae
