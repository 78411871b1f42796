// The inner loops (loops.h) for every processor, with vectors of 16 bytes; the compiler maps them to the instructions
// that all processors of the target have (SSE2 on x86-64, Neon on 64-bit ARM).
#include "kernels.h"

namespace fastmae {
namespace {

constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));
typedef std::uint32_t Bits __attribute__((vector_size(16)));
typedef std::int32_t Int __attribute__((vector_size(16)));  // only where SSE2 has no unsigned instruction
typedef double Double __attribute__((vector_size(16)));
typedef std::uint64_t Word __attribute__((vector_size(16)));

inline Float broadcast(float x) { return Float{x, x, x, x}; }
inline Word broadcast(std::uint64_t x) { return Word{x, x}; }
inline Word first_numbers() { return Word{0, 1}; }
inline Word multiply_low_halves(Word a, Word b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }

// a · b + c, rounded twice: not every processor can do it at once.
inline Float multiply_add(Float a, Float b, Float c) { return a * b + c; }

inline Float as_float(Bits x) { return reinterpret_cast<Float>(x); }
inline Bits as_bits(Float x) { return reinterpret_cast<Bits>(x); }
inline Double low_half(Float x) { return Double{x[0], x[1]}; }
inline Double high_half(Float x) { return Double{x[2], x[3]}; }

inline Float load(const float* p) {
  Float x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline Float load(const std::uint8_t* p) {
  typedef std::uint8_t Bytes __attribute__((vector_size(4)));
  Bytes x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, Int), Float);
}

inline Bits load_uint16(const void* p) {
  typedef std::uint16_t Words __attribute__((vector_size(8)));
  Words x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Bits);
}

inline void store(float* p, Float x) { __builtin_memcpy(p, &x, sizeof x); }

inline void store_uint16(void* p, Bits x) {
  const std::uint16_t low[kLanes] = {static_cast<std::uint16_t>(x[0]), static_cast<std::uint16_t>(x[1]),
                                     static_cast<std::uint16_t>(x[2]), static_cast<std::uint16_t>(x[3])};
  __builtin_memcpy(p, low, sizeof low);
}

// Between 0 and 255 the sum with 2^23 has no bits for a fraction, so the addition rounds to nearest even.
inline void store_uint8(std::uint8_t* p, Float x) {
  const Bits whole = as_bits(x + broadcast(8388608.0f));
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<std::uint8_t>(whole[i]);
}

// The bits of a half, moved to where a float has them, are too small by 2^112, subnormal numbers included.
inline Float load_half(const void* p) {
  const Bits bits = load_uint16(p);
  const Bits magnitude = bits & 0x7FFF;
  const Bits scaled = as_bits(as_float(magnitude << 13) * broadcast(0x1p112f));
  const Bits special = (magnitude << 13) | 0x7F800000;
  return as_float((reinterpret_cast<Int>(magnitude) >= 0x7C00 ? special : scaled) | ((bits & 0x8000) << 16));
}

inline void store_half(void* p, Float x) {
  const Bits bits = as_bits(x);
  const Bits magnitude = bits & 0x7FFFFFFF;
  const Int size = reinterpret_cast<Int>(magnitude);
  // Halves below 2^-14 are multiples of 2^-24, and so are the floats at 0.5: the addition rounds to one of them.
  const Bits subnormal = as_bits(as_float(magnitude) + broadcast(0.5f)) - 0x3F000000;
  const Bits normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const Bits nan = (magnitude & 0) + 0x7E00, infinity = (magnitude & 0) + 0x7C00;
  Bits half = size < 0x38800000 ? subnormal : normal;
  half = size >= 0x47800000 ? infinity : half;
  half = size > 0x7F800000 ? nan : half;
  store_uint16(p, half | ((bits >> 16) & 0x8000));
}

}  // namespace
}  // namespace fastmae

#include "loops.h"

namespace fastmae {
extern const Kernels kBaseline = table("baseline");
}
