// The inner loops (loops.h) for x86-64 processors with AVX2, FMA and F16C. The file is compiled with these flags, so nothing
// here may be called before instruction_set.cpp has asked the processor.
#include <immintrin.h>

#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 8;
typedef float Float __attribute__((vector_size(32)));
typedef std::uint32_t Bits __attribute__((vector_size(32)));
typedef double Double __attribute__((vector_size(32)));
typedef std::uint64_t Word __attribute__((vector_size(32)));

inline Float broadcast(float x) { return _mm256_set1_ps(x); }
inline Word broadcast(std::uint64_t x) { return Word{x, x, x, x}; }
inline Word first_numbers() { return Word{0, 1, 2, 3}; }
inline Word multiply_low_halves(Word a, Word b) {
  return reinterpret_cast<Word>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

// a · b + c, rounded once.
inline Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

inline Float as_float(Bits x) { return reinterpret_cast<Float>(x); }
inline Bits as_bits(Float x) { return reinterpret_cast<Bits>(x); }
inline Double low_half(Float x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Double high_half(Float x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline Float load(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Bits load_uint16(const void* p) { return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(load_128(p))); }
inline Float load_half(const void* p) { return _mm256_cvtph_ps(load_128(p)); }

inline void store_128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
inline void store_half(void* p, Float x) { store_128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

inline __m128i narrow_to_16(__m256i x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline void store_uint16(void* p, Bits x) { store_128(p, narrow_to_16(reinterpret_cast<__m256i>(x))); }
inline void store_uint8(std::uint8_t* p, Float x) {
  const __m128i words = narrow_to_16(_mm256_cvtps_epi32(x));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

}  // namespace
}  // namespace fastmae

#include "loops.h"

namespace fastmae {
extern const Kernels kAvx2 = table("avx2");
}
