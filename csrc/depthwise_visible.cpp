// The depthwise 7×7 convolution of visible cells for the CPU, and the gradients of its weights. Equivalent to
// fastmae/ops/depthwise_visible.py, which has the definition. A task is a block of channels of one image, or of a few
// when weights are wanted: its weights and what is read again and again stay in a core's caches.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "rows.h"

namespace fastmae {
namespace {

constexpr std::int64_t kImagesOfAGroup = 4;  // whose gradients of weights are added up by one task

// The slots of the cells around each visible cell, −1 where they are masked or outside: [K, side, side] of an image.
class Surroundings {
 public:
  Surroundings(const Slots& slots, std::int64_t s)
      : K_(slots.K), cells_((3 + s - 1) / s), side_(2 * cells_ + 1),
        around_(static_cast<std::size_t>(slots.N * K_ * side_ * side_), -1) {
    for (std::int64_t n = 0; n < slots.N; ++n) {
      const std::int32_t* of_image = slots.values.data() + n * slots.gh * slots.gw;
      for (std::int64_t y = 0; y < slots.gh; ++y)
        for (std::int64_t x = 0; x < slots.gw; ++x) {
          const std::int32_t k = of_image[y * slots.gw + x];
          if (k < 0) continue;
          const std::int64_t left = std::max<std::int64_t>(0, x - cells_), right = std::min(slots.gw - 1, x + cells_);
          for (std::int64_t row = std::max<std::int64_t>(0, y - cells_); row <= std::min(slots.gh - 1, y + cells_); ++row)
            std::copy(of_image + row * slots.gw + left, of_image + row * slots.gw + right + 1,
                      around_.data() + ((n * K_ + k) * side_ + row - y + cells_) * side_ + left - x + cells_);
        }
    }
  }

  const std::int32_t* of_image(std::int64_t n) const { return around_.data() + n * K_ * side_ * side_; }

 private:
  const std::int64_t K_, cells_, side_;
  std::vector<std::int32_t> around_;
};

// Blocks of channels for threads. What is left over by whole blocks is done by an overlapping one after the last.
struct Blocks {
  std::int64_t C, width;

  std::int64_t count() const { return C / width; }

  template <class Body>
  void with_channels(std::int64_t block, Body body) const {
    body(block * width);
    if (block + 1 == count() && C % width) body(C - width);
  }
};

}  // namespace

void depthwise_visible(const Array& x, const Slots& slots, const Array& weight, const Array* bias, bool turned,
                       int threads, const Array& out) {
  const std::int64_t N = slots.N, K = slots.K, s = slots.s, C = x.shape[3], of_image = K * s * s * C;
  const Kernels& loops = kernels();
  const Blocks blocks = {C, loops.depthwise_width(s, C)};
  const std::int64_t size = kDepthwiseTaps * blocks.width, packed_blocks = blocks.count() + (C % blocks.width != 0);
  std::vector<float> packed(static_cast<std::size_t>(packed_blocks * size));
  std::vector<float> taps(static_cast<std::size_t>(kDepthwiseTaps));
  PackedRow row(weight, 1);
  for (std::int64_t block = 0; block < packed_blocks; ++block)
    for (std::int64_t i = 0; i < blocks.width; ++i) {
      const std::int64_t channel = std::min(block * blocks.width, C - blocks.width) + i;
      loops.convert(row.of(weight.at(channel)), weight.dtype, kDepthwiseTaps, taps.data(), DType::kFloat32);
      for (std::int64_t tap = 0; tap < kDepthwiseTaps; ++tap)
        packed[static_cast<std::size_t>(block * size + tap * blocks.width + i)] =
            taps[static_cast<std::size_t>(turned ? kDepthwiseTaps - 1 - tap : tap)];
    }
  const std::vector<float> biases = bias ? floats_of(*bias) : std::vector<float>();
  const Surroundings around(slots, s);
  const std::int64_t bytes = 8 * K * s * s * blocks.width * size_of(x.dtype);  // each is read several times
  parallel_for_beside_torch(N * blocks.count(), bytes, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t task = first; task < last; ++task) {
      const std::int64_t n = task / blocks.count();
      blocks.with_channels(task % blocks.count(), [&](std::int64_t channel) {
        const std::int64_t offset = (n * of_image + channel) * size_of(x.dtype);
        const std::int64_t block = (channel + blocks.width - 1) / blocks.width;
        loops.depthwise({around.of_image(n), K, s, C}, x.dtype, x.data + offset, packed.data() + block * size,
                        bias ? biases.data() + channel : nullptr, out.data + offset);
      });
    }
  });
}

void depthwise_visible_weights(const Array& x, const Array& grad, const Slots& slots, int threads, const Array& sums) {
  const std::int64_t N = slots.N, K = slots.K, s = slots.s, C = x.shape[3], of_image = K * s * s * C;
  const Kernels& loops = kernels();
  const Blocks blocks = {C, loops.lanes};
  const Surroundings around(slots, s);
  constexpr std::int64_t kRows = kDepthwiseTaps + 1;
  GroupSums totals((N + kImagesOfAGroup - 1) / kImagesOfAGroup * kRowsOfAGroup, kRows * C);
  const std::int64_t bytes = 8 * kImagesOfAGroup * K * s * s * blocks.width * size_of(x.dtype);
  parallel_for_beside_torch(totals.groups * blocks.count(), bytes, threads, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> of_block(static_cast<std::size_t>(kRows * blocks.width));
    for (std::int64_t task = first; task < last; ++task) {
      const std::int64_t group = task / blocks.count();
      blocks.with_channels(task % blocks.count(), [&](std::int64_t channel) {
        std::fill(of_block.begin(), of_block.end(), 0.0f);
        for (std::int64_t n = group * kImagesOfAGroup; n < std::min((group + 1) * kImagesOfAGroup, N); ++n) {
          const std::int64_t offset = (n * of_image + channel) * size_of(x.dtype);
          loops.depthwise_weights({around.of_image(n), K, s, C}, x.dtype, x.data + offset, grad.data + offset,
                                  of_block.data());
        }
        float* total = totals.of_row(group * kRowsOfAGroup) + channel;
        for (std::int64_t row = 0; row < kRows; ++row)
          std::copy_n(of_block.data() + row * blocks.width, blocks.width, total + row * C);
      });
    }
  });
  totals.total(parallel_for_beside_torch, threads, reinterpret_cast<float*>(sums.data));
}

}  // namespace fastmae
