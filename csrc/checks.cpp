// The checks of all ops: types, shapes, strides, ranges of ids, and that no output lies on an input.
#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "instruction_set.h"

namespace fastmae {
namespace {

using Shape = std::initializer_list<std::int64_t>;

constexpr std::int64_t kMaxPatches = 65536, kMaxFeatures = 1048576, kMaxHead = 128;

std::string text_of(const std::int64_t* sizes, std::size_t count) {
  std::string text = "[";
  for (std::size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::string shape_of(const Array& array) {
  return text_of(array.shape.data(), static_cast<std::size_t>(array.ndim));
}

std::int64_t product(const char* name, Shape factors) {
  std::int64_t result = 1;
  for (const std::int64_t factor : factors)
    if (__builtin_mul_overflow(result, factor, &result))
      refuse(std::string(name) + " is too large: " + text_of(factors.begin(), factors.size()) + " exceeds 64 bits");
  return result;
}

void check_dtype(const Array& array, std::initializer_list<DType> allowed) {
  std::string names;
  for (const DType dtype : allowed) {
    if (array.dtype == dtype) return;
    names += (names.empty() ? "" : ", ") + std::string(name_of(dtype));
  }
  refuse(std::string(array.name) + " must be " + names + ", got " + name_of(array.dtype));
}

void check_floating(const Array& array) { check_dtype(array, {DType::kFloat32, DType::kFloat16, DType::kBfloat16}); }

void check_pixels(const Array& array) {
  check_dtype(array, {DType::kUint8, DType::kUint16, DType::kFloat32, DType::kFloat16, DType::kBfloat16});
}

void check_axes(const Array& array, int ndim, const char* axes) {
  if (array.ndim != ndim) refuse(std::string(array.name) + " must have shape " + axes + ", got " + shape_of(array));
}

void check_shape(const Array& array, Shape expected, const char* axes) {
  bool same = array.ndim == static_cast<int>(expected.size());
  int axis = 0;
  for (const std::int64_t size : expected) same = same && array.shape[axis++] == size;
  if (!same)
    refuse(std::string(array.name) + " must have shape " + axes + " = " + text_of(expected.begin(), expected.size()) +
           ", got " + shape_of(array));
}

std::int64_t elements_of(const Array& array) {
  std::int64_t count = 1;
  for (int axis = 0; axis < array.ndim; ++axis) count *= array.shape[axis];
  return count;
}

// The addresses [first, last) that an array may touch; empty arrays touch none.
std::pair<const char*, const char*> extent(const Array& array) {
  if (elements_of(array) == 0) return {array.data, array.data};
  const char* first = array.data;
  const char* last = array.data + size_of(array.dtype);
  for (int axis = 0; axis < array.ndim; ++axis) {
    const std::int64_t way = (array.shape[axis] - 1) * array.strides[axis];
    (way < 0 ? first : last) += way;
  }
  return {first, last};
}

void check_contiguous(const Array& array) {
  std::int64_t stride = size_of(array.dtype);
  for (int axis = array.ndim - 1; axis >= 0; --axis) {
    if (array.shape[axis] > 1 && array.strides[axis] != stride && elements_of(array) > 0)
      refuse(std::string(array.name) + " must be contiguous, got strides of " +
             text_of(array.strides.data(), static_cast<std::size_t>(array.ndim)) + " bytes");
    stride *= array.shape[axis];
  }
}

// An output must not overlap an input or another output, and must have no gaps. Null stands for one that is not there.
void check_output(const Array& output, std::initializer_list<const Array*> others) {
  if (!output.writeable) refuse(std::string(output.name) + " must be writeable, got a read-only array");
  check_contiguous(output);
  const auto [first, last] = extent(output);
  for (const Array* other : others) {
    if (!other) continue;
    const auto [other_first, other_last] = extent(*other);
    if (first < other_last && other_first < last)
      refuse(std::string(output.name) + " must not overlap " + other->name);
  }
}

void check_shape_of(const Array& array, const Array& like) {
  if (array.ndim != like.ndim || !std::equal(like.shape.begin(), like.shape.begin() + like.ndim, array.shape.begin()))
    refuse(std::string(array.name) + " must have the shape of " + like.name + ", " + shape_of(like) + ", got " +
           shape_of(array));
}

// Rows of numbers along the last axis.
void check_rows(const Array& array) {
  check_floating(array);
  if (array.ndim < 1 || array.shape[array.ndim - 1] < 1)
    refuse(std::string(array.name) + " must have a number in each row, got shape " + shape_of(array));
}

// A number for each column of the rows.
void check_columns(const Array& array, const Array& rows) {
  check_floating(array);
  check_shape(array, {rows.shape[rows.ndim - 1]}, "of a row");
}

// A float32 for each row.
void check_statistics(const Array& array, const Array& rows) {
  check_dtype(array, {DType::kFloat32});
  if (array.ndim != rows.ndim - 1 ||
      !std::equal(array.shape.begin(), array.shape.begin() + array.ndim, rows.shape.begin()))
    refuse(std::string(array.name) + " must have a number for each row of " + rows.name + " " + shape_of(rows) +
           ", got shape " + shape_of(array));
}

Ids check_ids(const Array& ids, std::int64_t rows, std::int64_t limit) {
  check_dtype(ids, {DType::kInt32, DType::kInt64});
  check_axes(ids, 2, "[N, ids of an image]");
  if (ids.shape[0] != rows)
    refuse(std::string(ids.name) + " must have " + std::to_string(rows) + " rows, got shape " + shape_of(ids));
  if (limit > std::numeric_limits<std::int32_t>::max())
    refuse(std::string(ids.name) + " must name fewer than 2^31 patches, got " + std::to_string(limit));
  Ids checked = {{}, rows, ids.shape[1]};
  checked.values.resize(static_cast<std::size_t>(elements_of(ids)));
  std::int32_t* out = checked.values.data();
  for (std::int64_t n = 0; n < checked.rows; ++n)
    for (std::int64_t i = 0; i < checked.count; ++i) {
      std::int64_t id;
      if (ids.dtype == DType::kInt64) {
        std::memcpy(&id, ids.at(n, i), sizeof id);
      } else {
        std::int32_t narrow;
        std::memcpy(&narrow, ids.at(n, i), sizeof narrow);
        id = narrow;
      }
      if (id < 0 || id >= limit)
        refuse(std::string(ids.name) + " must lie in [0, " + std::to_string(limit) + "), got " + std::to_string(id) +
               " in row " + std::to_string(n));
      *out++ = static_cast<std::int32_t>(id);
    }
  return checked;
}

void check_distinct(const Array& array, const Ids& ids, std::int64_t limit) {
  std::vector<std::int64_t> last_row(static_cast<std::size_t>(limit), -1);
  for (std::int64_t n = 0; n < ids.rows; ++n)
    for (std::int64_t i = 0; i < ids.count; ++i) {
      std::int64_t& row = last_row[static_cast<std::size_t>(ids.row(n)[i])];
      if (row == n)
        refuse(std::string(array.name) + " must be distinct in a row, got " + std::to_string(ids.row(n)[i]) +
               " twice in row " + std::to_string(n));
      row = n;
    }
}

// Contiguous rows x [N, P, D], and others like them or null.
void check_pair(const Array& x, const Array* other) {
  check_rows(x);
  check_axes(x, 3, "[N, P, D]");
  check_contiguous(x);
  if (!other) return;
  check_dtype(*other, {x.dtype});
  check_shape_of(*other, x);
  check_contiguous(*other);
}

// Cells x [N, K, s·s, C] and their slots [N, gh, gw]: each of the K once in an image, and −1.
Slots check_cells(const Array& x, const Array& slots) {
  check_floating(x);
  check_axes(x, 4, "[N, K, s·s, C]");
  check_contiguous(x);
  const std::int64_t N = x.shape[0], K = x.shape[1], positions = x.shape[2], C = x.shape[3];
  const std::int64_t s = positions == 64 ? 8 : positions == 16 ? 4 : positions == 4 ? 2 : positions;
  if (K < 1 || s * s != positions || s < 1 || C < kLeastChannels)
    refuse("x must have cells of 1, 2, 4 or 8 positions on a side and at least " + std::to_string(kLeastChannels) +
           " channels, got shape " + shape_of(x));
  check_axes(slots, 3, "[N, gh, gw]");
  if (slots.shape[0] != N)
    refuse("slots must have " + std::to_string(N) + " rows, got shape " + shape_of(slots));
  Slots checked = {{}, N, slots.shape[1], slots.shape[2], K, s};
  check_dtype(slots, {DType::kInt32, DType::kInt64});
  checked.values.reserve(static_cast<std::size_t>(elements_of(slots)));
  std::vector<std::int64_t> seen_in(static_cast<std::size_t>(std::min(K, elements_of(slots) + 1)), -1);
  for (std::int64_t n = 0; n < N; ++n) {
    std::int64_t found = 0;
    for (std::int64_t y = 0; y < checked.gh; ++y)
      for (std::int64_t column = 0; column < checked.gw; ++column) {
        const char* from = slots.at(n, y) + column * slots.strides[2];
        std::int64_t slot;
        if (slots.dtype == DType::kInt64) {
          std::memcpy(&slot, from, sizeof slot);
        } else {
          std::int32_t narrow;
          std::memcpy(&narrow, from, sizeof narrow);
          slot = narrow;
        }
        const bool known = slot >= 0 && slot < K && slot < static_cast<std::int64_t>(seen_in.size());
        if (slot != -1 && (!known || seen_in[static_cast<std::size_t>(slot)] == n)) found = -elements_of(slots);
        if (known) {
          seen_in[static_cast<std::size_t>(slot)] = n;
          ++found;
        }
        checked.values.push_back(static_cast<std::int32_t>(slot));
      }
    if (found != K)
      refuse("slots must hold each of 0 … " + std::to_string(K - 1) + " once for each image, and -1 elsewhere; image " +
             std::to_string(n) + " does not");
  }
  return checked;
}

void check_positive(const char* name, Pair sizes) {
  if (sizes[0] < 1 || sizes[1] < 1)
    refuse(std::string(name) + " must be two positive numbers, got " + text_of(sizes.data(), 2));
}

void check_scale(const PixelScale& by, std::int64_t channels) {
  for (const Array* values : {&by.mean, &by.std}) {
    check_floating(*values);
    check_shape(*values, {channels}, "[C]");
  }
  if (!by.value_range) return;
  check_floating(*by.value_range);
  check_shape(*by.value_range, {2, channels}, "[2, C]");
  const std::vector<double> low = channel_values(row(*by.value_range, 0)), high = channel_values(row(*by.value_range, 1));
  for (std::size_t c = 0; c < low.size(); ++c)
    if (!(low[c] < high[c] && std::isfinite(high[c] - low[c])))
      refuse("value_range must have low < high, both finite, got " + std::to_string(low[c]) + " and " +
             std::to_string(high[c]) + " of channel " + std::to_string(c));
}

Grid check_images(const Array& images, Pair patch_size, const PixelScale& by) {
  check_pixels(images);
  check_axes(images, 4, "[N, H, W, C]");
  check_positive("patch_size", patch_size);
  const std::int64_t H = images.shape[1], W = images.shape[2], C = images.shape[3];
  if (H % patch_size[0] || W % patch_size[1])
    refuse("patch_size must divide the sides of images " + shape_of(images) + ", got " + text_of(patch_size.data(), 2));
  if (C < 1) refuse("images must have a channel, got shape " + shape_of(images));
  check_scale(by, C);
  const Grid grid = {H / patch_size[0], W / patch_size[1], patch_size[0], patch_size[1], C};
  product("patch_size", {grid.ph, grid.pw, C, 8});  // images without pixels divide into patches of any size
  return grid;
}

// A head's numbers lie one after another, and are those of packed.
void check_heads(const Array& array, DType dtype, const char* axes) {
  check_dtype(array, {dtype});
  check_axes(array, 4, axes);
  if (array.shape[3] > 1 && array.strides[3] != size_of(array.dtype) && elements_of(array) > 0)
    refuse(std::string(array.name) + " must have no gaps on its last axis, got strides of " +
           text_of(array.strides.data(), 4) + " bytes");
}

// `like` is [N, T, H, D]: the output or its gradient.
void check_attended(const Array& packed, const Array* queries, const Array& lse, const Array& like, Multiply by) {
  check_dtype(packed, {DType::kFloat32, DType::kBfloat16});
  const std::string name = kMultiplyNames[static_cast<int>(by)];
  if (by != Multiply::kFloat32 && packed.dtype != DType::kBfloat16)
    refuse("products by " + name + " are for bfloat16, got packed of float32");
  if (!attention_kernels(packed.dtype, by))
    refuse("products by " + name + " need a processor with " + (by == Multiply::kDots ? "AVX512-BF16" : "AMX") +
           ", and its instruction set in use");
  check_heads(like, packed.dtype, "[N, T, H, D]");
  const std::int64_t N = like.shape[0], T = like.shape[1], H = like.shape[2], D = like.shape[3];
  if (T < 1 || H < 1) refuse(std::string(like.name) + " must have a token and a head, got shape " + shape_of(like));
  if (D < 16 || D % 16 || D > kMaxHead)
    refuse(std::string(like.name) + " must have heads of a multiple of 16 numbers up to " + std::to_string(kMaxHead) +
           ", got shape " + shape_of(like));
  if (queries) {
    check_heads(*queries, packed.dtype, "[N, T, H, D]");
    check_shape(*queries, {N, T, H, D}, "[N, T, H, D]");
    check_heads(packed, packed.dtype, "[N, S, 2·H, D]");
    check_shape(packed, {N, packed.shape[1], 2 * H, D}, "[N, S, 2·H, D]");
    if (packed.shape[1] < 1) refuse("packed must have a token, got shape " + shape_of(packed));
  } else {
    check_heads(packed, packed.dtype, "[N, T, 3·H, D]");
    check_shape(packed, {N, T, 3 * H, D}, "[N, T, 3·H, D]");
  }
  check_dtype(lse, {DType::kFloat32});
  check_shape(lse, {N, H, T}, "[N, H, T]");
  check_contiguous(lse);
}

}  // namespace

void refuse(const std::string& message) { throw std::invalid_argument(message); }

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kUint8: return "uint8";
    case DType::kUint16: return "uint16 (as int16)";
    case DType::kFloat16: return "float16";
    case DType::kBfloat16: return "bfloat16 (as uint16)";
    case DType::kFloat32: return "float32";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
  }
  return "unknown";
}

int check_threads(std::int64_t threads) {
  if (threads < 1 || threads > 65536) refuse("threads must lie in [1, 65536], got " + std::to_string(threads));
  return static_cast<int>(threads);
}

Multiply check_products(const std::string& name) {
  std::string known;
  for (const Multiply by : {Multiply::kFloat32, Multiply::kDots, Multiply::kTiles, Multiply::kEmulatedTiles}) {
    const std::string one = kMultiplyNames[static_cast<int>(by)];
    if (name == one) return by;
    known += (known.empty() ? "" : ", ") + one;
  }
  refuse("products must be one of " + known + ", got " + name);
}

void check_bernoulli_masking(const Array& draw_ids, const Array& masked) {
  check_dtype(draw_ids, {DType::kInt64});
  check_axes(draw_ids, 1, "[N]");
  check_dtype(masked, {DType::kUint8});
  check_axes(masked, 2, "[N, D]");
  const std::int64_t D = masked.shape[1];
  if (D < 2 || D > kMaxFeatures) refuse("features must be in [2, 1048576], got " + std::to_string(D));
  check_shape(masked, {draw_ids.shape[0], D}, "[N, D]");
  check_output(masked, {&draw_ids});
}

void check_random_masking(const Array& draw_ids, const Array& ids_shuffle) {
  check_dtype(draw_ids, {DType::kInt64});
  check_axes(draw_ids, 1, "[N]");
  check_dtype(ids_shuffle, {DType::kInt32});
  check_axes(ids_shuffle, 2, "[N, L]");
  const std::int64_t L = ids_shuffle.shape[1];
  if (L < 1 || L > kMaxPatches) refuse("num_patches must be in [1, 65536], got " + std::to_string(L));
  check_shape(ids_shuffle, {draw_ids.shape[0], L}, "[N, L]");
  check_output(ids_shuffle, {&draw_ids});
}

Checked check_gather_patches(const Array& images, const Array& ids, Pair patch_size, const PixelScale& by,
                             const Array& patches) {
  const Grid grid = check_images(images, patch_size, by);
  Ids checked = check_ids(ids, images.shape[0], grid.L());
  check_floating(patches);
  check_shape(patches, {checked.rows, checked.count, grid.P()}, "[N, K, P]");
  check_output(patches, {&images, &ids, &by.mean, &by.std, by.value_range});
  return {std::move(checked), grid};
}

void check_resize(const Array& image, const Array& resized) {
  check_dtype(image, {DType::kUint8, DType::kUint16, DType::kFloat32});
  check_axes(image, 3, "[H, W, C]");
  check_axes(resized, 3, "[H, W, C]");
  if (resized.dtype != DType::kFloat32) check_dtype(resized, {image.dtype});
  const std::int64_t C = image.shape[2];
  check_shape(resized, {resized.shape[0], resized.shape[1], C}, "[H, W, C]");
  if (elements_of(image) < 1 || elements_of(resized) < 1)
    refuse("image and resized must have pixels, got shapes " + shape_of(image) + " and " + shape_of(resized));
  product("resized", {image.shape[0] + resized.shape[0], resized.shape[1], C, 4});
  const std::int64_t size = size_of(image.dtype);
  if ((C > 1 && image.strides[2] != size) || (image.shape[1] > 1 && image.strides[1] != C * size))
    refuse("image must have rows without gaps, got strides of " + text_of(image.strides.data(), 3) + " bytes");
  check_output(resized, {&image});
}

void check_unshuffle(const Array& data, const Array& out) {
  check_dtype(data, {DType::kUint8});
  check_dtype(out, {DType::kUint8});
  check_axes(data, 2, "[B, n]");
  const std::int64_t B = data.shape[0], n = data.shape[1];
  check_shape(out, {n, B}, "[n, B]");
  if ((n > 1 && data.strides[1] != 1) || (B > 1 && n > 0 && data.strides[0] != n))
    refuse("data must have no gaps, got strides of " + text_of(data.strides.data(), 2) + " bytes");
  check_output(out, {&data});
}

Ids check_assemble_tokens(const Array& visible, const Array& mask_token, const Array& pos_embed,
                          const Array& ids_shuffle, const Array& tokens) {
  check_floating(visible);
  check_axes(visible, 3, "[N, K+1, D]");
  const std::int64_t N = visible.shape[0], visible_tokens = visible.shape[1], D = visible.shape[2];
  check_axes(ids_shuffle, 2, "[N, L]");
  const std::int64_t L = ids_shuffle.shape[1];
  if (visible_tokens < 1 || visible_tokens > L + 1)
    refuse("visible must hold 1 to " + std::to_string(L + 1) + " tokens an image, got shape " + shape_of(visible));
  check_floating(mask_token);
  check_shape(mask_token, {D}, "[D]");
  check_floating(pos_embed);
  check_shape(pos_embed, {L + 1, D}, "[L+1, D]");
  Ids checked = check_ids(ids_shuffle, N, L);
  check_floating(tokens);
  check_shape(tokens, {N, L + 1, D}, "[N, L+1, D]");
  check_output(tokens, {&visible, &mask_token, &pos_embed, &ids_shuffle});
  return checked;
}

void check_assemble_tokens_backward(const Array& grad, const Array& grad_visible, const Array& grad_mask_token) {
  check_floating(grad);
  check_axes(grad, 3, "[N, L+1, D]");
  check_floating(grad_visible);
  check_axes(grad_visible, 3, "[N, K+1, D]");
  const std::int64_t visible_tokens = grad_visible.shape[1];
  if (visible_tokens < 1 || visible_tokens > grad.shape[1])
    refuse("visible_tokens must lie in [1, " + std::to_string(grad.shape[1]) + "], got " +
           std::to_string(visible_tokens));
  check_shape(grad_visible, {grad.shape[0], visible_tokens, grad.shape[2]}, "[N, K+1, D]");
  check_dtype(grad_mask_token, {DType::kFloat32});
  check_shape(grad_mask_token, {grad.shape[2]}, "[D]");
  check_output(grad_visible, {&grad, &grad_mask_token});
  check_output(grad_mask_token, {&grad});
}

namespace {

Checked check_prediction(const Array& pred, const Array& images, const Array& ids, Pair patch_size,
                         const PixelScale& by, double eps) {
  const Grid grid = check_images(images, patch_size, by);
  Ids checked = check_ids(ids, images.shape[0], grid.L());
  check_floating(pred);
  check_shape(pred, {checked.rows, checked.count, grid.P()}, "[N, M, P]");
  if (elements_of(pred) == 0) refuse("pred must have elements to take the mean of, got shape " + shape_of(pred));
  if (!(eps >= 0)) refuse("eps must be at least 0, got " + std::to_string(eps));
  return {std::move(checked), grid};
}

}  // namespace

Checked check_masked_mse(const Array& pred, const Array& images, const Array& ids, Pair patch_size,
                         const PixelScale& by, double eps, const Array& loss, const Array& targets) {
  Checked checked = check_prediction(pred, images, ids, patch_size, by, eps);
  for (const Array* output : {&loss, &targets}) {
    check_dtype(*output, {DType::kFloat32});
    check_shape(*output, {}, "[]");
  }
  check_output(loss, {&pred, &images, &ids, &by.mean, &by.std, by.value_range, &targets});
  check_output(targets, {&pred, &images, &ids, &by.mean, &by.std, by.value_range});
  return checked;
}

Checked check_masked_mse_backward(const Array& grad_loss, const Array& targets, const Array& pred, const Array& images,
                                  const Array& ids, Pair patch_size, const PixelScale& by, double eps,
                                  const Array& gradient) {
  Checked checked = check_prediction(pred, images, ids, patch_size, by, eps);
  for (const Array* input : {&grad_loss, &targets}) {
    check_dtype(*input, {DType::kFloat32});
    check_shape(*input, {}, "[]");
  }
  check_dtype(gradient, {pred.dtype});
  check_shape_of(gradient, pred);
  check_output(gradient, {&grad_loss, &targets, &pred, &images, &ids, &by.mean, &by.std, by.value_range});
  return checked;
}

Checked check_scatter_patches(const Array& patches, const Array& ids, Pair grid_size, Pair patch_size,
                              const PixelScale& by, const Array& images) {
  check_floating(patches);
  check_axes(patches, 3, "[N, M, P]");
  check_positive("grid_size", grid_size);
  check_positive("patch_size", patch_size);
  check_axes(by.mean, 1, "[C]");
  const std::int64_t C = by.mean.shape[0];
  check_scale(by, C);
  if (C < 1) refuse("mean must have one number a channel, got shape " + shape_of(by.mean));
  const Grid grid = {grid_size[0], grid_size[1], patch_size[0], patch_size[1], C};
  product("images", {grid.gh, grid.gw, grid.ph, grid.pw, C, 8});
  check_pixels(images);
  check_shape(images, {patches.shape[0], grid.gh * grid.ph, grid.gw * grid.pw, C}, "[N, gh·ph, gw·pw, C]");
  Ids checked = check_ids(ids, patches.shape[0], grid.L());
  check_shape(patches, {checked.rows, checked.count, grid.P()}, "[N, M, P]");
  if (checked.rows > 0) check_distinct(ids, checked, grid.L());
  check_output(images, {&patches, &ids, &by.mean, &by.std, by.value_range});
  return {std::move(checked), grid};
}

void check_transpose_and_sum(const Array& matrix, const Array& transposed, const Array& sums) {
  check_dtype(matrix, {DType::kFloat32});
  check_axes(matrix, 2, "[R, C]");
  check_dtype(transposed, {DType::kFloat32});
  check_shape(transposed, {matrix.shape[1], matrix.shape[0]}, "[C, R]");
  check_dtype(sums, {DType::kFloat32});
  check_shape(sums, {matrix.shape[1]}, "[C]");
  check_output(transposed, {&matrix, &sums});
  check_output(sums, {&matrix});
}

void check_gelu(const Array& h, const Array* bias, const Array& out) {
  check_rows(h);
  if (bias) check_columns(*bias, h);
  check_dtype(out, {h.dtype});
  check_shape_of(out, h);
  check_output(out, {&h, bias});
}

void check_gelu_backward(const Array& grad, const Array& h, const Array* bias, const Array& grad_h,
                         const Array* grad_bias, const Array* out) {
  check_rows(h);
  if (bias) check_columns(*bias, h);
  check_dtype(grad, {h.dtype});
  check_shape_of(grad, h);
  check_dtype(grad_h, {h.dtype});
  check_shape_of(grad_h, h);
  check_output(grad_h, {&grad, &h, bias, out});
  if (out) {
    check_dtype(*out, {h.dtype});
    check_shape_of(*out, h);
    check_output(*out, {&grad, &h, bias});
  }
  if (!bias != !grad_bias) refuse("grad_bias must come with bias, and only with it");
  if (!grad_bias) return;
  check_dtype(*grad_bias, {DType::kFloat32});
  check_shape(*grad_bias, {h.shape[h.ndim - 1]}, "[F]");
  check_output(*grad_bias, {&grad, &h, bias, &grad_h, out});
}

void check_add_layer_norm(const Array& x, const Array& branch, const Array* branch_bias, const Array& weight,
                          const Array& bias, double eps, const Array& stream, const Array& normed, const Array& mean, const Array& rstd) {
  check_rows(x);
  check_floating(branch);
  check_shape_of(branch, x);
  if (branch_bias) check_columns(*branch_bias, x);
  check_columns(weight, x);
  check_columns(bias, x);
  if (!(eps >= 0)) refuse("eps must be at least 0, got " + std::to_string(eps));
  check_dtype(stream, {x.dtype});
  check_shape_of(stream, x);
  check_floating(normed);
  check_shape_of(normed, x);
  check_statistics(mean, x);
  check_statistics(rstd, x);
  check_output(stream, {&x, &branch, branch_bias, &weight, &bias, &normed, &mean, &rstd});
  check_output(normed, {&x, &branch, branch_bias, &weight, &bias, &mean, &rstd});
  check_output(mean, {&x, &branch, branch_bias, &weight, &bias, &rstd});
  check_output(rstd, {&x, &branch, branch_bias, &weight, &bias});
}

void check_add_layer_norm_backward(const Array* grad_stream, const Array& grad_normed, const Array& stream,
                                   const Array& weight, const Array& mean, const Array& rstd, const Array& grad_x,
                                   const Array* grad_branch, const Array& grad_affine) {
  check_rows(stream);
  if (grad_stream) {
    check_dtype(*grad_stream, {stream.dtype});
    check_shape_of(*grad_stream, stream);
  }
  check_floating(grad_normed);
  check_shape_of(grad_normed, stream);
  check_columns(weight, stream);
  check_statistics(mean, stream);
  check_contiguous(mean);
  check_statistics(rstd, stream);
  check_contiguous(rstd);
  check_dtype(grad_x, {stream.dtype});
  check_shape_of(grad_x, stream);
  check_output(grad_x, {grad_stream, &grad_normed, &stream, &weight, &mean, &rstd, grad_branch, &grad_affine});
  check_dtype(grad_affine, {DType::kFloat32});
  const bool of_branch_bias = grad_affine.ndim == 2 && grad_affine.shape[0] == 3;
  check_shape(grad_affine, {of_branch_bias ? 3 : 2, stream.shape[stream.ndim - 1]}, "[2 or 3, D]");
  check_output(grad_affine, {grad_stream, &grad_normed, &stream, &weight, &mean, &rstd, grad_branch});
  if (!grad_branch) return;
  check_floating(*grad_branch);
  check_shape_of(*grad_branch, stream);
  check_output(*grad_branch, {grad_stream, &grad_normed, &stream, &weight, &mean, &rstd});
}

void check_sums_of_products(const Array& x, const Array* other, const Array& sums) {
  check_pair(x, other);
  check_dtype(sums, {DType::kFloat32});
  check_shape(sums, {other ? 2 : 1, x.shape[0], x.shape[2]}, other ? "[2, N, D]" : "[1, N, D]");
  check_output(sums, {&x, other});
}

void check_scale_and_add(const Array& x, const Array& scale, const Array* other, const Array& added,
                         const Array& out) {
  check_pair(x, other);
  check_dtype(scale, {DType::kFloat32});
  check_shape(scale, {x.shape[0], x.shape[2]}, "[N, D]");
  check_contiguous(scale);
  check_dtype(added, {DType::kFloat32});
  const bool is_one = added.ndim == 2 && added.shape[0] == 1;
  check_shape(added, {is_one ? 1 : x.shape[0], x.shape[2]}, "[N or 1, D]");
  check_contiguous(added);
  check_dtype(out, {x.dtype});
  check_shape_of(out, x);
  check_output(out, {&x, &scale, other, &added});
}

Slots check_depthwise_visible(const Array& x, const Array& slots, const Array& weight, const Array* bias,
                              const Array& out) {
  Slots checked = check_cells(x, slots);
  const std::int64_t C = x.shape[3];
  check_floating(weight);
  check_shape(weight, {C, kDepthwiseTaps}, "[C, 49]");
  if (bias) {
    check_floating(*bias);
    check_shape(*bias, {C}, "[C]");
  }
  check_dtype(out, {x.dtype});
  check_shape_of(out, x);
  check_output(out, {&x, &slots, &weight, bias});
  return checked;
}

Slots check_depthwise_visible_weights(const Array& x, const Array& grad, const Array& slots, const Array& sums) {
  Slots checked = check_cells(x, slots);
  check_dtype(grad, {x.dtype});
  check_shape_of(grad, x);
  check_contiguous(grad);
  check_dtype(sums, {DType::kFloat32});
  check_shape(sums, {kDepthwiseTaps + 1, x.shape[3]}, "[50, C]");
  check_output(sums, {&x, &grad, &slots});
  return checked;
}

void check_attention(const Array& packed, const Array* queries, Multiply by, const Array& out, const Array& lse) {
  check_attended(packed, queries, lse, out, by);
  const Array& asking = queries ? *queries : packed;
  check_output(out, {&packed, &asking, &lse});
  check_output(lse, {&packed, &asking});
}

void check_attention_backward(const Array& grad, const Array& packed, const Array* queries, const Array& lse,
                              Multiply by, const Array& grad_packed, const Array* grad_queries) {
  check_attended(packed, queries, lse, grad, by);
  if (!queries != !grad_queries) refuse("grad_queries must come with queries, and only with them");
  const Array& asking = queries ? *queries : packed;
  check_dtype(grad_packed, {packed.dtype});
  check_shape(grad_packed, {packed.shape[0], packed.shape[1], packed.shape[2], packed.shape[3]}, "of packed");
  check_output(grad_packed, {&grad, &packed, &asking, &lse});
  if (!grad_queries) return;
  check_dtype(*grad_queries, {packed.dtype});
  check_shape(*grad_queries, {asking.shape[0], asking.shape[1], asking.shape[2], asking.shape[3]}, "of queries");
  check_output(*grad_queries, {&grad, &packed, &asking, &lse, &grad_packed});
}

}  // namespace fastmae
