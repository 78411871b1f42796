// fastmae._C: the C++ ops, over NumPy arrays so that building needs no torch. NumPy has no bfloat16: uint16 means it, and int16
// means uint16.
// Here an array becomes a view of memory, checks.h checks all views of a call, then the op runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "checks.h"
#include "instruction_set.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using fastmae::Array;
using fastmae::Checked;
using fastmae::DType;
using fastmae::Ids;
using fastmae::Pair;
using fastmae::refuse;
using fastmae::size_of;
using fastmae::Slots;

DType dtype_of(const char* name, const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '=' || dtype.byteorder() == '|') {
    const auto is = [&](char kind, int size) { return dtype.kind() == kind && dtype.itemsize() == size; };
    if (is('u', 1)) return DType::kUint8;
    if (is('u', 2)) return DType::kBfloat16;
    if (is('i', 2)) return DType::kUint16;
    if (is('f', 2)) return DType::kFloat16;
    if (is('f', 4)) return DType::kFloat32;
    if (is('i', 4)) return DType::kInt32;
    if (is('i', 8)) return DType::kInt64;
  }
  refuse(std::string(name) + " must be uint8, uint16 (as int16), float16, bfloat16 (as uint16), float32, int32 or int64, got " +
         std::string(py::str(dtype)));
}

Array view(const char* name, const py::array& array) {
  Array result = {name, nullptr, dtype_of(name, array), static_cast<int>(array.ndim()), {}, {}, array.writeable()};
  if (array.ndim() > 4) refuse(std::string(name) + " must have at most 4 axes, got " + std::to_string(array.ndim()));
  result.data = static_cast<char*>(const_cast<void*>(array.data()));
  const std::int64_t size = size_of(result.dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(result.data) % static_cast<std::uintptr_t>(size) == 0;
  for (int axis = 0; axis < result.ndim; ++axis) {
    result.shape[axis] = array.shape(axis);
    result.strides[axis] = array.strides(axis);
    aligned = aligned && (result.shape[axis] < 2 || result.strides[axis] % size == 0);
  }
  if (!aligned) refuse(std::string(name) + " must be aligned to its numbers of " + std::to_string(size) + " bytes");
  return result;
}

// Each function makes views, checks them and runs the op. The views stay valid without the GIL: the caller holds the
// arrays.

void random_masking(const py::array& draw_ids, std::uint64_t seed, std::int64_t threads,
                    const py::array& ids_shuffle) {
  const Array in = view("draw_ids", draw_ids), out = view("ids_shuffle", ids_shuffle);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_random_masking(in, out);
  const py::gil_scoped_release release;
  fastmae::random_masking(in, seed, workers, out);
}

void bernoulli_masking(const py::array& draw_ids, std::uint64_t seed, std::uint64_t below, std::int64_t threads,
                       const py::array& masked) {
  const Array in = view("draw_ids", draw_ids), out = view("masked", masked);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_bernoulli_masking(in, out);
  const py::gil_scoped_release release;
  fastmae::bernoulli_masking(in, seed, below, workers, out);
}

using Optional = std::optional<py::array>;

std::optional<Array> view(const char* name, const Optional& array) {
  return array ? std::optional<Array>(view(name, *array)) : std::nullopt;
}

const Array* pointer(const std::optional<Array>& array) { return array ? &*array : nullptr; }

// The scale of pixels, whose arrays live as long as it does.
struct Scale {
  Scale(const py::array& mean, const py::array& std, const Optional& value_range, std::optional<double> nodata)
      : means(view("mean", mean)), stds(view("std", std)), ranges(view("value_range", value_range)) {
    if (nodata) value = static_cast<float>(*nodata);
  }

  fastmae::PixelScale get() const { return {means, stds, pointer(ranges), value}; }

  const Array means, stds;
  const std::optional<Array> ranges;
  std::optional<float> value;
};

void gather_patches(const py::array& images, const py::array& ids, Pair patch_size, const py::array& mean,
                    const py::array& std, const Optional& value_range, std::optional<double> nodata,
                    std::int64_t threads, const py::array& patches) {
  const Array in = view("images", images), out = view("patches", patches);
  const Scale by(mean, std, value_range, nodata);
  const int workers = fastmae::check_threads(threads);
  const Checked checked = fastmae::check_gather_patches(in, view("ids", ids), patch_size, by.get(), out);
  const py::gil_scoped_release release;
  fastmae::gather_patches(in, checked.ids, checked.grid, by.get(), workers, out);
}

void resize(const py::array& image, bool mirrored, std::optional<double> nodata, const py::array& resized) {
  const Array in = view("image", image), out = view("resized", resized);
  fastmae::check_resize(in, out);
  const float value = nodata ? static_cast<float>(*nodata) : 0.0f;
  const py::gil_scoped_release release;
  fastmae::resize(in, mirrored, nodata ? &value : nullptr, out);
}

void unshuffle(const py::array& data, const py::array& out) {
  const Array in = view("data", data), into = view("out", out);
  fastmae::check_unshuffle(in, into);
  const py::gil_scoped_release release;
  fastmae::unshuffle(in, into);
}

void assemble_tokens(const py::array& visible, const py::array& mask_token, const py::array& pos_embed,
                     const py::array& ids_shuffle, std::int64_t threads, const py::array& tokens) {
  const Array in = view("visible", visible), mask = view("mask_token", mask_token);
  const Array positions = view("pos_embed", pos_embed), out = view("tokens", tokens);
  const int workers = fastmae::check_threads(threads);
  const Ids ids = fastmae::check_assemble_tokens(in, mask, positions, view("ids_shuffle", ids_shuffle), out);
  const py::gil_scoped_release release;
  fastmae::assemble_tokens(in, mask, positions, ids, workers, out);
}

void assemble_tokens_backward(const py::array& grad, std::int64_t threads, const py::array& grad_visible,
                              const py::array& grad_mask_token) {
  const Array in = view("grad", grad);
  const Array out = view("grad_visible", grad_visible), mask = view("grad_mask_token", grad_mask_token);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_assemble_tokens_backward(in, out, mask);
  const py::gil_scoped_release release;
  fastmae::assemble_tokens_backward(in, workers, out, mask);
}

void masked_mse(const py::array& pred, const py::array& images, const py::array& ids, Pair patch_size,
                const py::array& mean, const py::array& std, const Optional& value_range,
                std::optional<double> nodata, bool norm_pix, double eps, std::int64_t threads, const py::array& loss,
                const py::array& targets) {
  const Array in = view("pred", pred), pixels = view("images", images);
  const Scale by(mean, std, value_range, nodata);
  const Array sum = view("loss", loss), count = view("targets", targets);
  const int workers = fastmae::check_threads(threads);
  const Checked checked =
      fastmae::check_masked_mse(in, pixels, view("ids", ids), patch_size, by.get(), eps, sum, count);
  const py::gil_scoped_release release;
  fastmae::masked_mse(in, pixels, checked.ids, checked.grid, by.get(), norm_pix, eps, workers, sum, count);
}

void masked_mse_backward(const py::array& grad_loss, const py::array& targets, const py::array& pred,
                         const py::array& images, const py::array& ids, Pair patch_size, const py::array& mean,
                         const py::array& std, const Optional& value_range, std::optional<double> nodata,
                         bool norm_pix, double eps, std::int64_t threads, const py::array& gradient) {
  const Array of_loss = view("grad_loss", grad_loss), count = view("targets", targets);
  const Array in = view("pred", pred), pixels = view("images", images), out = view("gradient", gradient);
  const Scale by(mean, std, value_range, nodata);
  const int workers = fastmae::check_threads(threads);
  const Checked checked = fastmae::check_masked_mse_backward(of_loss, count, in, pixels, view("ids", ids), patch_size,
                                                             by.get(), eps, out);
  const py::gil_scoped_release release;
  fastmae::masked_mse_backward(of_loss, count, in, pixels, checked.ids, checked.grid, by.get(), norm_pix, eps,
                               workers, out);
}

void scatter_patches(const py::array& patches, const py::array& ids, Pair grid_size, Pair patch_size,
                     const py::array& mean, const py::array& std, const Optional& value_range, std::int64_t threads,
                     const py::array& images) {
  const Array in = view("patches", patches), out = view("images", images);
  const Scale by(mean, std, value_range, std::nullopt);
  const int workers = fastmae::check_threads(threads);
  const Checked checked =
      fastmae::check_scatter_patches(in, view("ids", ids), grid_size, patch_size, by.get(), out);
  const py::gil_scoped_release release;
  fastmae::scatter_patches(in, checked.ids, checked.grid, by.get(), workers, out);
}

void transpose_and_sum(const py::array& matrix, std::int64_t threads, const py::array& transposed,
                       const py::array& sums) {
  const Array in = view("matrix", matrix), out = view("transposed", transposed), total = view("sums", sums);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_transpose_and_sum(in, out, total);
  const py::gil_scoped_release release;
  fastmae::transpose_and_sum(in, workers, out, total);
}

void gelu(const py::array& h, const Optional& bias, std::int64_t threads, const py::array& out) {
  const Array in = view("h", h), result = view("out", out);
  const std::optional<Array> added = view("bias", bias);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_gelu(in, pointer(added), result);
  const py::gil_scoped_release release;
  fastmae::gelu(in, pointer(added), workers, result);
}

void gelu_backward(const py::array& grad, const py::array& h, const Optional& bias, std::int64_t threads,
                   const py::array& grad_h, const Optional& grad_bias, const Optional& out) {
  const Array of_out = view("grad", grad), in = view("h", h), result = view("grad_h", grad_h);
  const std::optional<Array> added = view("bias", bias), of_added = view("grad_bias", grad_bias);
  const std::optional<Array> again = view("out", out);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_gelu_backward(of_out, in, pointer(added), result, pointer(of_added), pointer(again));
  const py::gil_scoped_release release;
  fastmae::gelu_backward(of_out, in, pointer(added), workers, result, pointer(of_added), pointer(again));
}

void add_layer_norm(const py::array& x, const py::array& branch, const Optional& branch_bias,
                    const py::array& weight, const py::array& bias, double eps, std::int64_t threads, const py::array& stream, const py::array& normed,
                    const py::array& mean, const py::array& rstd) {
  const Array in = view("x", x), other = view("branch", branch);
  const std::optional<Array> added = view("branch_bias", branch_bias);
  const Array weights = view("weight", weight), biases = view("bias", bias);
  const Array sum = view("stream", stream), out = view("normed", normed);
  const Array means = view("mean", mean), rstds = view("rstd", rstd);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_add_layer_norm(in, other, pointer(added), weights, biases, eps, sum, out, means, rstds);
  const py::gil_scoped_release release;
  fastmae::add_layer_norm(in, other, pointer(added), weights, biases, eps, workers, sum, out, means, rstds);
}

void add_layer_norm_backward(const Optional& grad_stream, const py::array& grad_normed, const py::array& stream,
                             const py::array& weight, const py::array& mean, const py::array& rstd,
                             std::int64_t threads, const py::array& grad_x, const Optional& grad_branch,
                             const py::array& grad_affine) {
  const std::optional<Array> of_stream = view("grad_stream", grad_stream), narrow = view("grad_branch", grad_branch);
  const Array of_normed = view("grad_normed", grad_normed), sum = view("stream", stream);
  const Array weights = view("weight", weight), means = view("mean", mean), rstds = view("rstd", rstd);
  const Array result = view("grad_x", grad_x), of_affine = view("grad_affine", grad_affine);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_add_layer_norm_backward(pointer(of_stream), of_normed, sum, weights, means, rstds, result,
                                         pointer(narrow), of_affine);
  const py::gil_scoped_release release;
  fastmae::add_layer_norm_backward(pointer(of_stream), of_normed, sum, weights, means, rstds, workers, result,
                                   pointer(narrow), of_affine);
}

void sums_of_products(const py::array& x, const Optional& other, std::int64_t threads, const py::array& sums) {
  const Array in = view("x", x), total = view("sums", sums);
  const std::optional<Array> beside = view("other", other);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_sums_of_products(in, pointer(beside), total);
  const py::gil_scoped_release release;
  fastmae::sums_of_products(in, pointer(beside), workers, total);
}

void scale_and_add(const py::array& x, const py::array& scale, const Optional& other, const py::array& added,
                   std::int64_t threads, const py::array& out) {
  const Array in = view("x", x), by = view("scale", scale), shift = view("added", added), result = view("out", out);
  const std::optional<Array> beside = view("other", other);
  const int workers = fastmae::check_threads(threads);
  fastmae::check_scale_and_add(in, by, pointer(beside), shift, result);
  const py::gil_scoped_release release;
  fastmae::scale_and_add(in, by, pointer(beside), shift, workers, result);
}

void depthwise_visible(const py::array& x, const py::array& slots, const py::array& weight, const Optional& bias,
                       bool turned, std::int64_t threads, const py::array& out) {
  const Array in = view("x", x), weights = view("weight", weight), result = view("out", out);
  const std::optional<Array> added = view("bias", bias);
  const int workers = fastmae::check_threads(threads);
  const Slots checked = fastmae::check_depthwise_visible(in, view("slots", slots), weights, pointer(added), result);
  const py::gil_scoped_release release;
  fastmae::depthwise_visible(in, checked, weights, pointer(added), turned, workers, result);
}

void depthwise_visible_weights(const py::array& x, const py::array& grad, const py::array& slots, std::int64_t threads,
                               const py::array& sums) {
  const Array in = view("x", x), of_out = view("grad", grad), total = view("sums", sums);
  const int workers = fastmae::check_threads(threads);
  const Slots checked = fastmae::check_depthwise_visible_weights(in, of_out, view("slots", slots), total);
  const py::gil_scoped_release release;
  fastmae::depthwise_visible_weights(in, of_out, checked, workers, total);
}

void attention(const py::array& packed, const Optional& queries, const std::string& products, std::int64_t threads,
               const py::array& out, const py::array& lse) {
  const Array in = view("packed", packed), result = view("out", out), logs = view("lse", lse);
  const std::optional<Array> asking = view("queries", queries);
  const int workers = fastmae::check_threads(threads);
  const fastmae::Multiply by = fastmae::check_products(products);
  fastmae::check_attention(in, pointer(asking), by, result, logs);
  const py::gil_scoped_release release;
  fastmae::attention(in, pointer(asking), by, workers, result, logs);
}

void attention_backward(const py::array& grad, const py::array& packed, const Optional& queries, const py::array& lse,
                        const std::string& products, std::int64_t threads, const py::array& grad_packed, const Optional& grad_queries) {
  const Array of_out = view("grad", grad), in = view("packed", packed), logs = view("lse", lse);
  const Array result = view("grad_packed", grad_packed);
  const std::optional<Array> asking = view("queries", queries), of_asking = view("grad_queries", grad_queries);
  const int workers = fastmae::check_threads(threads);
  const fastmae::Multiply by = fastmae::check_products(products);
  fastmae::check_attention_backward(of_out, in, pointer(asking), logs, by, result, pointer(of_asking));
  const py::gil_scoped_release release;
  fastmae::attention_backward(of_out, in, pointer(asking), logs, by, workers, result, pointer(of_asking));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  m.doc() = "fastmae's C++ ops; use them through fastmae.ops. The last arrays of each are written to.";
  m.def("random_masking", &random_masking, arg("draw_ids"), arg("seed"), arg("threads"), arg("ids_shuffle"),
        "draw_ids int64 [N] -> ids_shuffle int32 [N, L]");
  m.def("bernoulli_masking", &bernoulli_masking, arg("draw_ids"), arg("seed"), arg("below"), arg("threads"),
        arg("masked"), "draw_ids int64 [N] -> masked uint8 [N, D], 1 where a random word is below");
  m.def("gather_patches", &gather_patches, arg("images"), arg("ids"), arg("patch_size"), arg("mean"),
        arg("std"), arg("value_range"), arg("nodata"), arg("threads"), arg("patches"),
        "images [N, H, W, C], ids [N, K], mean and std [C], value_range [2, C] or None -> patches [N, K, P]");
  m.def("resize", &resize, arg("image"), arg("mirrored"), arg("nodata"), arg("resized"),
        "image [H, W, C] -> resized [H, W, C], antialiased bicubic");
  m.def("unshuffle", &unshuffle, arg("data"), arg("out"),
        "data uint8 [B, n], by the place of bytes in a number -> out uint8 [n, B]");
  m.def("assemble_tokens", &assemble_tokens, arg("visible"), arg("mask_token"), arg("pos_embed"),
        arg("ids_shuffle"), arg("threads"), arg("tokens"),
        "visible [N, K+1, D], mask_token [D], pos_embed [L+1, D], ids_shuffle [N, L] -> tokens [N, L+1, D]");
  m.def("assemble_tokens_backward", &assemble_tokens_backward, arg("grad"), arg("threads"),
        arg("grad_visible"), arg("grad_mask_token"),
        "grad [N, L+1, D] -> grad_visible [N, K+1, D], grad_mask_token float32 [D]");
  m.def("masked_mse", &masked_mse, arg("pred"), arg("images"), arg("ids"), arg("patch_size"), arg("mean"),
        arg("std"), arg("value_range"), arg("nodata"), arg("norm_pix"), arg("eps"), arg("threads"), arg("loss"),
        arg("targets"), "pred [N, M, P], images [N, H, W, C], ids [N, M], mean, std, value_range -> loss and number of "
        "targets, float32 []");
  m.def("masked_mse_backward", &masked_mse_backward, arg("grad_loss"), arg("targets"), arg("pred"), arg("images"),
        arg("ids"), arg("patch_size"), arg("mean"), arg("std"), arg("value_range"), arg("nodata"), arg("norm_pix"),
        arg("eps"), arg("threads"), arg("gradient"),
        "grad_loss and targets float32 [], and what masked_mse was given -> gradient [N, M, P]");
  m.def("scatter_patches", &scatter_patches, arg("patches"), arg("ids"), arg("grid_size"), arg("patch_size"),
        arg("mean"), arg("std"), arg("value_range"), arg("threads"), arg("images"),
        "patches [N, M, P], ids [N, M], mean and std [C], value_range [2, C] or None -> images [N, H, W, C]");
  m.def("transpose_and_sum", &transpose_and_sum, arg("matrix"), arg("threads"), arg("transposed"), arg("sums"),
        "matrix float32 [R, C] -> transposed float32 [C, R], sums of the columns float32 [C]");
  m.def("gelu", &gelu, arg("h"), arg("bias"), arg("threads"), arg("out"), "h [..., F], bias [F] -> out [..., F]");
  m.def("gelu_backward", &gelu_backward, arg("grad"), arg("h"), arg("bias"), arg("threads"), arg("grad_h"),
        arg("grad_bias"), arg("out"),
        "grad, h [..., F], bias [F] -> grad_h [..., F], grad_bias float32 [F], out [..., F], that of gelu, or None");
  m.def("add_layer_norm", &add_layer_norm, arg("x"), arg("branch"), arg("branch_bias"), arg("weight"), arg("bias"), arg("eps"),
        arg("threads"), arg("stream"), arg("normed"), arg("mean"), arg("rstd"),
        "x, branch [..., D], branch_bias, weight and bias [D] -> stream, normed [..., D], mean and rstd float32 [...]");
  m.def("add_layer_norm_backward", &add_layer_norm_backward, arg("grad_stream"), arg("grad_normed"), arg("stream"),
        arg("weight"), arg("mean"), arg("rstd"), arg("threads"), arg("grad_x"), arg("grad_branch"), arg("grad_affine"),
        "gradients, stream [..., D], weight [D], mean and rstd [...] -> grad_x, grad_branch [..., D], "
        "grad_affine float32 [2 or 3, D], the third row for branch_bias");
  m.def("sums_of_products", &sums_of_products, arg("x"), arg("other"), arg("threads"), arg("sums"),
        "x, other [N, P, D] or None -> sums float32 [2, N, D] of x*other and of other, or [1, N, D] of x*x");
  m.def("scale_and_add", &scale_and_add, arg("x"), arg("scale"), arg("other"), arg("added"), arg("threads"), arg("out"),
        "x, other [N, P, D] or None, scale [N, D], added [N or 1, D] -> out [N, P, D], x*scale + other*added");
  m.def("depthwise_visible", &depthwise_visible, arg("x"), arg("slots"), arg("weight"), arg("bias"), arg("turned"),
        arg("threads"), arg("out"),
        "x [N, K, s*s, C], slots [N, gh, gw], weight [C, 49], bias [C] or None -> out [N, K, s*s, C]");
  m.def("depthwise_visible_weights", &depthwise_visible_weights, arg("x"), arg("grad"), arg("slots"), arg("threads"),
        arg("sums"), "x, grad [N, K, s*s, C], slots [N, gh, gw] -> sums float32 [50, C]: of weights, and of the bias");
  m.def("attention", &attention, arg("packed"), arg("queries"), arg("products"), arg("threads"), arg("out"), arg("lse"),
        "packed [N, S, 3H, D], or [N, S, 2H, D] with queries [N, T, H, D] -> out [N, T, H, D], lse float32 [N, H, T]");
  m.def("attention_backward", &attention_backward, arg("grad"), arg("packed"), arg("queries"), arg("lse"),
        arg("products"), arg("threads"), arg("grad_packed"), arg("grad_queries"),
        "grad [N, T, H, D] -> the gradients of what attention was given");
  m.def("attention_products", &fastmae::attention_products, "What attention of bfloat16 can multiply with here.");
  m.def("instruction_sets", &fastmae::instruction_sets, "Names of those that run here, the best one last.");
  m.def("instruction_set", [] { return fastmae::kernels().name; }, "The name of the one in use.");
  m.def("set_instruction_set", &fastmae::set_instruction_set, arg("name"), "Uses another one from now on.");
  m.attr("sanitized") = bool{FASTMAE_SANITIZED};
}
