// fastmae._C: the C++ ops, over NumPy arrays so that building needs no torch. Shapes and ranges are checked here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "random_masking.h"

namespace py = pybind11;

namespace {

constexpr std::int64_t kMaxPatches = 65536;

using DrawIds = py::array_t<std::int64_t, py::array::c_style>;

py::array_t<std::int32_t> random_masking(const DrawIds& draw_ids, std::uint64_t seed, std::int64_t num_patches) {
  if (draw_ids.ndim() != 1) throw std::invalid_argument("draw_ids must have one dimension");
  if (num_patches < 1 || num_patches > kMaxPatches)
    throw std::invalid_argument("num_patches must be in [1, 65536], got " + std::to_string(num_patches));
  const py::ssize_t rows = draw_ids.shape(0);
  py::array_t<std::int32_t> ids_shuffle({rows, static_cast<py::ssize_t>(num_patches)});
  const std::int64_t* in = draw_ids.data();
  std::int32_t* out = ids_shuffle.mutable_data();
  {
    py::gil_scoped_release release;
    fastmae::random_masking(in, static_cast<std::size_t>(rows), seed, static_cast<std::uint32_t>(num_patches), out);
  }
  return ids_shuffle;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastmae's C++ ops; use them through fastmae.ops";
  m.def("random_masking", &random_masking, py::arg("draw_ids").noconvert(), py::arg("seed"), py::arg("num_patches"),
        "draw_ids int64 [N], seed, num_patches L -> ids_shuffle int32 [N, L]");
}
