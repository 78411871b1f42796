// The inner loops of every op but attention, written once and compiled once per instruction set.
//
// How it is included: isa_baseline.cpp, isa_avx2.cpp and isa_avx512.cpp include it once each, after they have defined,
// in an unnamed namespace inside fastmae, the vectors Float, Bits and Word (kLanes 32-bit numbers; half as many 64-bit
// ones), and the functions that load, store and convert them. No other file may include it, so it has no include guard
// on purpose. CMakeLists.txt compiles each of these files with the flags of its instruction set, and table() at the end
// makes the functions known to instruction_set.cpp.
//
// Nothing here may have external linkage: a template of the standard library, instantiated for AVX-512, could be the
// one copy that the linker keeps for all files. So there is no #include but that of depthwise_loops.h, which is a part of it, and all functions are in the unnamed
// namespace.

namespace fastmae {
namespace {

struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};
struct Uint16 {
  std::uint16_t bits;
};

inline Float load(const Half* p) { return load_half(p); }
inline Float load(const Bfloat* p) { return as_float(load_uint16(p) << 16); }

// The bits of 2^23 + n are those of 2^23 and n, for n below 2^23, and all these numbers are exact.
inline Float load(const Uint16* p) { return as_float(load_uint16(p) | 0x4B000000) - 8388608.0f; }

inline void store(Half* p, Float x) { store_half(p, x); }

inline void store(Bfloat* p, Float x) {
  const Bits bits = as_bits(x);
  const Bits rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  store_uint16(p, ((x == x ? rounded : (bits | 0x400000)) >> 16) & 0xFFFF);
}

// From 0 to the largest; NaN becomes 0.
inline Float clamped(Float x, float largest) {
  const Float zero = broadcast(0.0f), full = broadcast(largest);
  x = x > zero ? x : zero;
  return x < full ? x : full;
}

// Both round to nearest even: the sum with 2^23 has no bits for a fraction.
inline void store(std::uint8_t* p, Float x) { store_uint8(p, clamped(x, 255.0f)); }
inline void store(Uint16* p, Float x) { store_uint16(p, as_bits(clamped(x, 65535.0f) + 8388608.0f) & 0xFFFF); }

// Loads the first n of kLanes numbers; the others are 0.
template <class T>
inline Float load(const T* p, std::int64_t n) {
  if (n == kLanes) return load(p);
  T whole[kLanes] = {};
  __builtin_memcpy(whole, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(whole);
}

template <class T>
inline void store(T* p, Float x, std::int64_t n) {
  if (n == kLanes) return store(p, x);
  T whole[kLanes];
  store(whole, x);
  __builtin_memcpy(p, whole, static_cast<std::size_t>(n) * sizeof(T));
}

// Calls body(i, n) for vectors of n numbers from i on that cover [0, count). The last vector overlaps the one before
// instead of being short, so body must give the same result if it handles a number twice.
template <class Body>
inline void for_each_vector(std::int64_t count, Body body) {
  if (count < kLanes) {
    if (count > 0) body(std::int64_t{0}, count);
    return;
  }
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, std::int64_t{kLanes});
  if (i < count) body(count - kLanes, std::int64_t{kLanes});
}

// Calls body(pointer of the type) for the type that dtype names. checks.cpp has refused all other types.
template <class Body>
inline void with_float_pointer(const void* p, DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(static_cast<const float*>(p));
  if (dtype == DType::kFloat16) return body(static_cast<const Half*>(p));
  body(static_cast<const Bfloat*>(p));
}

template <class Body>
inline void with_float_pointer(void* p, DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(static_cast<float*>(p));
  if (dtype == DType::kFloat16) return body(static_cast<Half*>(p));
  body(static_cast<Bfloat*>(p));
}

template <class T>
struct PixelType {
  using Type = T;
};

// The same for the types of pixels: calls body(PixelType<T>{}).
template <class Body>
inline void with_pixel_type(DType dtype, Body body) {
  if (dtype == DType::kUint8) return body(PixelType<std::uint8_t>{});
  if (dtype == DType::kUint16) return body(PixelType<Uint16>{});
  if (dtype == DType::kFloat32) return body(PixelType<float>{});
  if (dtype == DType::kFloat16) return body(PixelType<Half>{});
  body(PixelType<Bfloat>{});
}

// Philox4x32-10 (Salmon et al. 2011), the same bits as fastmae/philox.py, which says how counters are laid out. Each
// 64-bit lane has one block. Products read only the low halves of their factors, so the high halves may hold anything.
void random_keys(std::uint64_t seed, std::uint64_t stream, std::uint64_t id, std::int64_t blocks,
                 std::uint64_t* keys) {
  const Word multiplier0 = broadcast(std::uint64_t{0xD2511F53u}), multiplier1 = broadcast(std::uint64_t{0xCD9E8D57u});
  for (std::int64_t first = 0; first < blocks; first += kLanes / 2) {
    Word c0 = first_numbers() + static_cast<std::uint64_t>(first), c1 = broadcast(stream);
    Word c2 = broadcast(id), c3 = broadcast(id >> 32);
    std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Word product0 = multiply_low_halves(multiplier0, c0), product1 = multiply_low_halves(multiplier1, c2);
      c0 = (product1 >> 32) ^ c1 ^ std::uint64_t{key0};
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ std::uint64_t{key1};
      c3 = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const Word index = (first_numbers() + static_cast<std::uint64_t>(first)) * 4;
    const Word found[4] = {(c0 << 32) | index, (c1 << 32) | (index + 1), (c2 << 32) | (index + 2),
                           (c3 << 32) | (index + 3)};
    for (int block = 0; block < kLanes / 2; ++block)
      for (int word = 0; word < 4; ++word) keys[4 * (first + block) + word] = found[word][block];
  }
}

template <class In, class Out>
inline void normalise_rows(const PixelRows<const char>& pixels, Normalisation by, Out* out) {
  for (std::int64_t row = 0; row < pixels.rows; ++row) {
    const In* in = reinterpret_cast<const In*>(pixels.data + row * pixels.stride);
    for_each_vector(pixels.columns, [&](std::int64_t i, std::int64_t n) {
      const Float x = (load(in + i, n) - load(by.offset + i, n)) - load(by.offset_rest + i, n);
      store(out + i, x * load(by.scale + i, n), n);
    });
    out += pixels.columns;
  }
}

// The same where pixels may be missing.
template <class In, class Out>
inline bool normalise_present(const PixelRows<const char>& pixels, Normalisation by, float nodata, Out* out) {
  const Float zero = broadcast(0.0f), marker = broadcast(nodata);
  Bits found = {};
  for (std::int64_t row = 0; row < pixels.rows; ++row) {
    const In* in = reinterpret_cast<const In*>(pixels.data + row * pixels.stride);
    for_each_vector(pixels.columns, [&](std::int64_t i, std::int64_t n) {
      const Float pixel = load(in + i, n), x = (pixel - load(by.offset + i, n)) - load(by.offset_rest + i, n);
      auto missing = (pixel == marker) | (pixel != pixel);
      store(out + i, missing ? zero : x * load(by.scale + i, n), n);
      for (std::int64_t lane = n; lane < kLanes; ++lane) missing[lane] = 0;  // what load added
      found |= reinterpret_cast<Bits>(missing);
    });
    out += pixels.columns;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (found[lane]) return true;
  return false;
}

bool normalise(PixelRows<const char> pixels, DType pixels_dtype, Normalisation by, const float* nodata, void* out,
               DType out_dtype) {
  bool missing = false;
  with_float_pointer(out, out_dtype, [&](auto* to) {
    with_pixel_type(pixels_dtype, [&](auto type) {
      using In = typename decltype(type)::Type;
      if (nodata)
        missing = normalise_present<In>(pixels, by, *nodata, to);
      else
        normalise_rows<In>(pixels, by, to);
    });
  });
  return missing;
}

template <class Out, class In>
inline void denormalise_rows(const In* in, Normalisation by, const PixelRows<char>& pixels) {
  const Float unit = broadcast(by.unit);
  for (std::int64_t row = 0; row < pixels.rows; ++row) {
    Out* out = reinterpret_cast<Out*>(pixels.data + row * pixels.stride);
    for_each_vector(pixels.columns, [&](std::int64_t i, std::int64_t n) {
      store(out + i, (load(in + i, n) * load(by.scale + i, n) + load(by.offset + i, n)) * unit, n);
    });
    in += pixels.columns;
  }
}

void denormalise(const void* patch, DType patch_dtype, Normalisation by, PixelRows<char> pixels, DType pixels_dtype) {
  with_float_pointer(patch, patch_dtype, [&](const auto* from) {
    with_pixel_type(pixels_dtype, [&](auto type) {
      denormalise_rows<typename decltype(type)::Type>(from, by, pixels);
    });
  });
}

constexpr int kParts = kLaneBlock / kLanes;

inline std::int64_t whole_blocks(std::int64_t count) { return (count + kLaneBlock - 1) / kLaneBlock * kLaneBlock; }

// Number i is added to lane i % kLaneBlock, and the lanes are added pairwise, for every width of a vector.
inline double sum_of_lanes(const Float (&parts)[kParts]) {
  double lanes[kLaneBlock];
  for (int i = 0; i < kLaneBlock; ++i) lanes[i] = parts[i / kLanes][i % kLanes];
  for (int width = kLaneBlock / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sum is float64, so that the mean of a patch of one colour is exactly that colour.
inline double mean_of(const float* x, std::int64_t count) {
  Double low[kParts] = {}, high[kParts] = {};
  for (std::int64_t i = 0; i < count; i += kLaneBlock) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const Float vector = load(x + i + part * kLanes);
      low[part] += low_half(vector);
      high[part] += high_half(vector);
    }
  }
  double lanes[kLaneBlock];
  for (int i = 0; i < kLaneBlock; ++i) {
    const int part = i / kLanes, lane = i % kLanes;
    lanes[i] = lane < kLanes / 2 ? low[part][lane] : high[part][lane - kLanes / 2];
  }
  for (int width = kLaneBlock / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0] / static_cast<double>(count);
}

// Takes a second pass over the numbers, which lie in the first-level cache.
inline double squared_deviations(const float* x, std::int64_t count, float mean) {
  Float squares[kParts] = {};
  const Float centre = broadcast(mean);
  for (std::int64_t i = 0; i < count; i += kLaneBlock) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const Float deviation = load(x + i + part * kLanes) - centre;
      squares[part] += deviation * deviation;
    }
  }
  return sum_of_lanes(squares);
}

// What makes the target of a patch, (target - mean) * scale.
struct TargetScale {
  float mean, scale;
};

// Pads the target so that the padding adds nothing to the mean, then nothing to the variance, then nothing to the error.
inline TargetScale target_scale(float* target, std::int64_t count, bool norm_pix, double eps) {
  const std::int64_t padded = whole_blocks(count);
  for (std::int64_t i = count; i < padded; ++i) target[i] = 0;
  if (!norm_pix) return {0, 1};
  const float mean = static_cast<float>(mean_of(target, count));
  for (std::int64_t i = count; i < padded; ++i) target[i] = mean;
  const double variance = squared_deviations(target, count, mean) / static_cast<double>(count - 1);
  return {mean, static_cast<float>(1 / __builtin_sqrt(variance + eps))};
}

// Calls body(i, numbers) for blocks of kLaneBlock numbers from i on; those beyond the end are 0.
template <class T, class Body>
inline void for_each_block(const T* pred, std::int64_t count, Body body) {
  std::int64_t i = 0;
  for (; i + kLaneBlock <= count; i += kLaneBlock) body(i, pred + i);
  if (i == count) return;
  T padded[kLaneBlock] = {};
  __builtin_memcpy(padded, pred + i, static_cast<std::size_t>(count - i) * sizeof(T));
  body(i, static_cast<const T*>(padded));
}

double patch_error(float* target, std::int64_t count, bool norm_pix, double eps, const void* pred, DType dtype) {
  const TargetScale by = target_scale(target, count, norm_pix, eps);
  const Float centre = broadcast(by.mean), factor = broadcast(by.scale);
  Float squares[kParts] = {};
  with_float_pointer(pred, dtype, [&](const auto* from) {
    for_each_block(from, count, [&](std::int64_t first, const auto* numbers) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int i = part * kLanes;
        const Float error = load(numbers + i) - (load(target + first + i) - centre) * factor;
        squares[part] += error * error;
      }
    });
  });
  return sum_of_lanes(squares);
}

void patch_gradient(float* target, std::int64_t count, bool norm_pix, double eps, const void* pred, DType dtype,
                    float slope, void* gradient) {
  const TargetScale by = target_scale(target, count, norm_pix, eps);
  const Float centre = broadcast(by.mean), factor = broadcast(by.scale), slopes = broadcast(slope);
  with_float_pointer(gradient, dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(pred));
    for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
      const Float error = load(from + i, n) - (load(target + i, n) - centre) * factor;
      store(to + i, error * slopes, n);
    });
  });
}

void add(const void* one, DType one_dtype, const float* other, std::int64_t count, void* out, DType out_dtype) {
  with_float_pointer(one, one_dtype, [&](const auto* from) {
    with_float_pointer(out, out_dtype, [&](auto* to) {
      for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
        store(to + i, load(from + i, n) + load(other + i, n), n);
      });
    });
  });
}

void accumulate(const void* row, DType row_dtype, std::int64_t count, float* sum) {
  with_float_pointer(row, row_dtype, [&](const auto* from) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(sum + i, load(sum + i) + load(from + i));
    if (i < count) store(sum + i, load(sum + i, count - i) + load(from + i, count - i), count - i);
  });
}

void convert(const void* in, DType in_dtype, std::int64_t count, void* out, DType out_dtype) {
  with_float_pointer(in, in_dtype, [&](const auto* from) {
    with_float_pointer(out, out_dtype, [&](auto* to) {
      for_each_vector(count, [&](std::int64_t i, std::int64_t n) { store(to + i, load(from + i, n), n); });
    });
  });
}

// Calls body(i, n) for vectors of n numbers from i on that cover [0, count), each number once: the last one may be short.
template <class Body>
inline void for_each_part(std::int64_t count, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, std::int64_t{kLanes});
  if (i < count) body(i, count - i);
}

// a · b + c for a constant c.
inline Float multiply_add(Float a, Float b, float c) { return multiply_add(a, b, broadcast(c)); }

// e^x with a relative error of 1e-7 for x from -87 to 0; 0 below. NaN stays NaN.
inline Float exponential(Float x) {
  // Adding 1.5·2^23 leaves no bits for a fraction: the whole number is in the low bits.
  const Float shifted = multiply_add(x, broadcast(1.44269504f), 12582912.0f), whole = shifted - 12582912.0f;
  // ln 2 is split in two parts, the first short enough for an exact product. |r| ≤ ln 2 / 2.
  Float r = multiply_add(whole, broadcast(-0.693359375f), x);
  r = multiply_add(whole, broadcast(2.12194440e-4f), r);
  // (e^r - 1 - r) / r² as a polynomial fitted at Chebyshev's points; its error is 1e-8 of e^r.
  Float y = multiply_add(r, broadcast(0x1.6d444ep-10f), 0x1.120c68p-7f);
  y = multiply_add(y, r, 0x1.5554e8p-5f);
  y = multiply_add(y, r, 0x1.5554dcp-3f);
  y = multiply_add(y, r, 0.5f);
  y = multiply_add(y, r, 1.0f);
  y = multiply_add(y, r, 1.0f);
  const Bits exponent = (as_bits(shifted) << 23) + 0x3F800000;
  return x < broadcast(-87.0f) ? broadcast(0.0f) : y * as_float(exponent);
}

// The normal distribution at x: Φ(x), and e^(-x²/2), which is its density times √(2π).
struct Normal {
  Float below, exponential;
};

// Φ(-a) = e^(-a²/2) · R(a) for a ≥ 0. R falls slowly from 1/2, and a polynomial in a / (a + 3) follows it to 8e-9 of it,
// so that, unlike 1 + erf, Φ keeps its digits where it is small. Its absolute error is below 1.3e-7.
inline Normal normal(Float x) {
  Float a = as_float(as_bits(x) & 0x7FFFFFFF);
  a = a > broadcast(14.0f) ? broadcast(14.0f) : a;
  const Float s = a / (a + 3.0f);
  Float y = multiply_add(s, broadcast(0x1.c24b74p-6f), -0x1.816cf2p-4f);
  y = multiply_add(y, s, 0x1.5e8beap-4f);
  y = multiply_add(y, s, 0x1.f2804ap-8f);
  y = multiply_add(y, s, 0x1.02544ep-4f);
  y = multiply_add(y, s, -0x1.45b9c4p-3f);
  y = multiply_add(y, s, -0x1.25cd46p-2f);
  y = multiply_add(y, s, 0x1.0d9b3ep+0f);
  y = multiply_add(y, s, -0x1.326336p+0f);
  y = multiply_add(y, s, 0.5f);
  const Float e = exponential((a * -0.5f) * a), tail = e * y;
  return {x < broadcast(0.0f) ? tail : 1.0f - tail, e};
}

void gelu(const void* in, DType dtype, const float* bias, std::int64_t count, void* out) {
  with_float_pointer(out, dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(in));
    for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
      Float x = load(from + i, n);
      if (bias) x = x + load(bias + i, n);
      store(to + i, x * normal(x).below, n);
    });
  });
}

void gelu_backward(const void* grad, const void* in, DType dtype, const float* bias, std::int64_t count, void* out,
                   float* bias_sum, void* again) {
  with_float_pointer(out, dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(in));
    const auto* slope = static_cast<decltype(to)>(const_cast<void*>(grad));
    auto* values = static_cast<decltype(to)>(again);
    for_each_part(count, [&](std::int64_t i, std::int64_t n) {
      Float x = load(from + i, n);
      if (bias) x = x + load(bias + i, n);
      const Normal at_x = normal(x);
      const Float gradient = 
          load(slope + i, n) * multiply_add(x, at_x.exponential * 0.3989422804f, at_x.below);
      store(to + i, gradient, n);
      if (bias_sum) store(bias_sum + i, load(bias_sum + i, n) + gradient, n);
      if (values) store(values + i, x * at_x.below, n);
    });
  });
}

RowStatistics add_layer_norm(const void* x, DType x_dtype, const void* branch, DType branch_dtype,
                             const float* branch_bias, Affine affine, double eps, std::int64_t count, void* stream,
                             void* normed, DType normed_dtype, float* room) {
  const std::int64_t padded = whole_blocks(count);
  with_float_pointer(stream, x_dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(x));
    with_float_pointer(branch, branch_dtype, [&](const auto* other) {
      for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
        Float added = load(other + i, n);
        if (branch_bias) added = added + load(branch_bias + i, n);
        store(to + i, load(from + i, n) + added, n);
        store(room + i, load(to + i, n), n);
      });
    });
  });
  // The padding adds nothing to the mean, then nothing to the variance.
  for (std::int64_t i = count; i < padded; ++i) room[i] = 0;
  const float mean = static_cast<float>(mean_of(room, count));
  for (std::int64_t i = count; i < padded; ++i) room[i] = mean;
  const double variance = squared_deviations(room, count, mean) / static_cast<double>(count);
  const float rstd = static_cast<float>(1 / __builtin_sqrt(variance + eps));
  with_float_pointer(normed, normed_dtype, [&](auto* to) {
    for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
      const Float standard = (load(room + i, n) - mean) * rstd;
      store(to + i, standard * load(affine.weight + i, n) + load(affine.bias + i, n), n);
    });
  });
  return {mean, rstd};
}

void add_layer_norm_backward(const void* grad_stream, const void* grad_normed, DType normed_dtype, const void* stream,
                             DType stream_dtype, const float* weight, RowStatistics statistics, std::int64_t count,
                             void* grad_x, float* weight_sum, float* bias_sum, float* room) {
  const std::int64_t padded = whole_blocks(count);
  float* standards = room + padded;
  with_float_pointer(grad_normed, normed_dtype, [&](const auto* slope) {
    with_float_pointer(stream, stream_dtype, [&](const auto* from) {
      for_each_part(count, [&](std::int64_t i, std::int64_t n) {
        const Float gradient = load(slope + i, n);
        const Float standard = (load(from + i, n) - statistics.mean) * statistics.rstd;
        store(weight_sum + i, load(weight_sum + i, n) + gradient * standard, n);
        store(bias_sum + i, load(bias_sum + i, n) + gradient, n);
        store(standards + i, standard, n);
        store(room + i, gradient * load(weight + i, n), n);
      });
    });
  });
  for (std::int64_t i = count; i < padded; ++i) room[i] = standards[i] = 0;
  Float sums[kParts] = {}, products[kParts] = {};
  for (std::int64_t i = 0; i < padded; i += kLaneBlock) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const Float gradient = load(room + i + part * kLanes);
      sums[part] += gradient;
      products[part] += gradient * load(standards + i + part * kLanes);
    }
  }
  const float mean = static_cast<float>(sum_of_lanes(sums) / static_cast<double>(count));
  const float slope = static_cast<float>(sum_of_lanes(products) / static_cast<double>(count));
  with_float_pointer(grad_x, stream_dtype, [&](auto* to) {
    const auto* past = static_cast<decltype(to)>(const_cast<void*>(grad_stream));
    for_each_part(count, [&](std::int64_t i, std::int64_t n) {
      Float gradient = ((load(room + i, n) - mean) - load(standards + i, n) * slope) * statistics.rstd;
      if (past) gradient = gradient + load(past + i, n);
      store(room + i, gradient, n);
      store(to + i, gradient, n);
    });
  });
}

void add_products(const void* x, const void* other, DType dtype, std::int64_t count, float* products, float* sums) {
  with_float_pointer(x, dtype, [&](const auto* from) {
    const auto* beside = static_cast<decltype(from)>(other);
    for_each_part(count, [&](std::int64_t i, std::int64_t n) {
      const Float one = load(from + i, n), two = beside ? load(beside + i, n) : one;
      store(products + i, load(products + i, n) + one * two, n);
      if (beside) store(sums + i, load(sums + i, n) + two, n);
    });
  });
}

void scale_and_add(const void* x, const void* other, DType dtype, const float* scale, const float* added,
                   std::int64_t count, void* out) {
  with_float_pointer(out, dtype, [&](auto* to) {
    const auto* from = static_cast<decltype(to)>(const_cast<void*>(x));
    const auto* beside = static_cast<decltype(to)>(const_cast<void*>(other));
    for_each_vector(count, [&](std::int64_t i, std::int64_t n) {
      Float sum = load(added + i, n);
      if (beside) sum = sum * load(beside + i, n);
      store(to + i, load(from + i, n) * load(scale + i, n) + sum, n);
    });
  });
}

}  // namespace
}  // namespace fastmae

#include "depthwise_loops.h"

namespace fastmae {
namespace {

constexpr Kernels table(const char* name) {
  return {name,
          kLanes,
          random_keys,
          normalise,
          denormalise,
          patch_error,
          patch_gradient,
          add,
          accumulate,
          gelu,
          gelu_backward,
          add_layer_norm,
          add_layer_norm_backward,
          add_products,
          scale_and_add,
          depthwise_width,
          depthwise,
          depthwise_weights,
          convert};
}

}  // namespace
}  // namespace fastmae
