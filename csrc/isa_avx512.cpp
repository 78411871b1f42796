// The inner loops (loops.h) for x86-64 processors with AVX-512 F, BW, VL and DQ. The file is compiled with these flags,
// so nothing here may be called before instruction_set.cpp has asked the processor.
#include <immintrin.h>

#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 16;
typedef float Float __attribute__((vector_size(64)));
typedef std::uint32_t Bits __attribute__((vector_size(64)));
typedef double Double __attribute__((vector_size(64)));
typedef std::uint64_t Word __attribute__((vector_size(64)));

inline Float broadcast(float x) { return _mm512_set1_ps(x); }
inline Word broadcast(std::uint64_t x) { return Word{x, x, x, x, x, x, x, x}; }
inline Word first_numbers() { return Word{0, 1, 2, 3, 4, 5, 6, 7}; }
inline Word multiply_low_halves(Word a, Word b) {
  return reinterpret_cast<Word>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

// a · b + c, rounded once.
inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

inline Float as_float(Bits x) { return reinterpret_cast<Float>(x); }
inline Bits as_bits(Float x) { return reinterpret_cast<Bits>(x); }
inline Double low_half(Float x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Double high_half(Float x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline Float load(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Bits load_uint16(const void* p) { return reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(load_256(p))); }
inline Float load_half(const void* p) { return _mm512_cvtph_ps(load_256(p)); }

inline void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
inline void store_half(void* p, Float x) { store_256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_uint16(void* p, Bits x) { store_256(p, _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x))); }
inline void store_uint8(std::uint8_t* p, Float x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

}  // namespace
}  // namespace fastmae

#include "loops.h"

namespace fastmae {
extern const Kernels kAvx512 = table("avx512");
}
