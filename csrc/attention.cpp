// attention for the CPU, forward and backward: each head of each image is one task; no two tasks write the same memory.
// Equivalent to fastmae/ops/attention.py, which has the definition.
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "instruction_set.h"
#include "ops.h"
#include "parallel.h"

namespace fastmae {
namespace {

// Head h of image n of [N, tokens, heads, D].
void* head_of(const Array& array, std::int64_t n, std::int64_t h) { return array.at(n) + h * array.strides[2]; }

float* floats(const Array& lse, std::int64_t n, std::int64_t h) { return reinterpret_cast<float*>(lse.at(n, h)); }

// The distance of two tokens, in numbers.
std::int64_t row(const Array& array) { return array.strides[1] / size_of(array.dtype); }

// The memory of one thread, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : storage_(new float[static_cast<std::size_t>(count) + kLine]) {
    const std::size_t beyond = reinterpret_cast<std::uintptr_t>(storage_.get()) / sizeof(float) % kLine;
    aligned_ = storage_.get() + (kLine - beyond) % kLine;
  }

  float* get() const { return aligned_; }

 private:
  static constexpr std::size_t kLine = 16;
  std::unique_ptr<float[]> storage_;
  float* aligned_;
};

// The parts of packed [N, S, 3·H, D], or of queries [N, T, H, D] and packed [N, S, 2·H, D].
struct Parts {
  Array q, k, v;

  Parts(const Array& packed, const Array* queries, std::int64_t H)
      : q(queries ? *queries : packed), k(packed), v(packed) {
    k.data += (queries ? 0 : H) * packed.strides[2];
    v.data += (queries ? 1 : 2) * H * packed.strides[2];
  }

  template <class Void>
  AttentionHead<Void> head(std::int64_t n, std::int64_t h) const {
    return {head_of(q, n, h), head_of(k, n, h), head_of(v, n, h), row(q), row(k), row(v)};
  }

  AttentionShape shape() const {
    const std::int64_t D = q.shape[3];
    return {q.shape[1], k.shape[1], D, static_cast<float>(1 / std::sqrt(static_cast<double>(D)))};
  }

  std::int64_t bytes_of_a_head() const {
    return (q.shape[1] + 2 * k.shape[1]) * q.shape[3] * size_of(q.dtype);
  }
};

}  // namespace

void tile_fault(const char* what) { throw std::logic_error(std::string("AMX would refuse ") + what); }

void attention(const Array& packed, const Array* queries, Multiply by, int threads, const Array& out,
               const Array& lse) {
  const std::int64_t H = out.shape[2];
  const Parts parts(packed, queries, H);
  const AttentionShape shape = parts.shape();
  const AttentionKernels& loops = *attention_kernels(packed.dtype, by);
  const std::int64_t bytes = parts.bytes_of_a_head();
  parallel_for_beside_torch(out.shape[0] * H, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    const Scratch scratch(loops.room(shape, false));
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / H, h = i % H;
      loops.forward(parts.head<const void>(n, h), shape, head_of(out, n, h), row(out), floats(lse, n, h),
                    scratch.get());
    }
  });
}

void attention_backward(const Array& grad, const Array& packed, const Array* queries, const Array& lse, Multiply by,
                        int threads, const Array& grad_packed, const Array* grad_queries) {
  const std::int64_t H = grad.shape[2];
  const Parts parts(packed, queries, H), gradients(grad_packed, grad_queries, H);
  const AttentionShape shape = parts.shape();
  const AttentionKernels& loops = *attention_kernels(packed.dtype, by);
  const std::int64_t bytes = 2 * parts.bytes_of_a_head();
  parallel_for_beside_torch(grad.shape[0] * H, bytes, threads, [&](std::int64_t first, std::int64_t last) {
    const Scratch scratch(loops.room(shape, true));
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = i / H, h = i % H;
      loops.backward(parts.head<const void>(n, h), shape, head_of(grad, n, h), row(grad), floats(lse, n, h),
                     gradients.head<void>(n, h), scratch.get());
    }
  });
}

}  // namespace fastmae
