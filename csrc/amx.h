// The processor's operations on tiles (x86-64 with AMX-TILE and AMX-BF16); see tiles.h.
//
// Written as assembly, and not by the compiler's intrinsics: those of GCC 12 do not tell the compiler which memory is
// read and written (its bug 114098), and would need a target attribute on every function that they are inlined into. No
// compiler puts anything of its own into tiles.
#pragma once

namespace fastmae {
namespace {

struct AmxTiles {
  static void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int t>
  static void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int c, int a, int b>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace fastmae
