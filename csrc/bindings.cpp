// pybind11 module valm_kernels._native: glue only. Raw pointers come in as integers (tensor.data_ptr());
// shapes and dtypes are checked in Python before.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "image_attn/image_attn.hpp"
#include "topk/cuda.hpp"
#include "topk/topk.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native code of valm_kernels; call it through valm_kernels.";

    py::class_<valm::Rows>(m, "Rows").def(
        py::init([](uintptr_t data, uintptr_t scale, const std::string& dtype, int64_t count, int64_t dim) {
            return valm::Rows{reinterpret_cast<const void*>(data), reinterpret_cast<const float*>(scale),
                              valm::element_of(dtype), count, dim};
        }),
        py::arg("data"), py::arg("scale"), py::arg("dtype"), py::arg("count"), py::arg("dim"));
    py::class_<valm::FirstPass>(m, "FirstPass")
        .def(py::init([](uintptr_t codes, uintptr_t stats, uintptr_t centre, uintptr_t axis, int64_t count,
                         uintptr_t row, uintptr_t next_duplicate) {
                 return valm::FirstPass{reinterpret_cast<uint8_t*>(codes),
                                        reinterpret_cast<float*>(stats),
                                        reinterpret_cast<float*>(centre),
                                        reinterpret_cast<float*>(axis),
                                        count,
                                        reinterpret_cast<const int32_t*>(row),
                                        reinterpret_cast<const int32_t*>(next_duplicate)};
             }),
             py::arg("codes"), py::arg("stats"), py::arg("centre"), py::arg("axis"), py::arg("count"), py::arg("row"),
             py::arg("next_duplicate"));
    m.def("cpu_isas", &valm::cpu_isas);
    m.def(
        "find_duplicates",
        [](const valm::Rows& rows, int threads, uintptr_t row, uintptr_t next_duplicate) {
            return valm::find_duplicates(rows, threads, reinterpret_cast<int32_t*>(row),
                                         reinterpret_cast<int32_t*>(next_duplicate));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("pack", &valm::pack, py::call_guard<py::gil_scoped_release>());
    m.def("ip_topk_cpu",
          [](uintptr_t queries, int64_t n_queries, const valm::Rows& rows, const valm::FirstPass* first_pass, int64_t k,
             const std::string& isa, int threads, uintptr_t scores, uintptr_t indices) {
              const auto interrupted = [] {
                  py::gil_scoped_acquire gil;
                  return PyErr_CheckSignals() != 0;
              };
              int64_t broken_row;
              {
                  py::gil_scoped_release release;
                  broken_row = valm::ip_topk_cpu(reinterpret_cast<const float*>(queries), n_queries, rows, first_pass,
                                                 k, isa, threads, interrupted, reinterpret_cast<float*>(scores),
                                                 reinterpret_cast<int64_t*>(indices));
              }
              if (PyErr_Occurred()) throw py::error_already_set();
              return broken_row;
          });

    m.def("image_attn_forward", &valm::image_attn_forward, py::call_guard<py::gil_scoped_release>());
    m.def("image_attn_backward", &valm::image_attn_backward, py::call_guard<py::gil_scoped_release>());
    m.def("image_attn_isas", &valm::image_attn_isas);

#ifdef VALM_KERNELS_CUDA
    m.attr("built_with_cuda") = true;
    m.def("cuda_devices", &valm::cuda_devices);
    m.def("cuda_row_norms", [](int device, const valm::Rows& rows, uintptr_t norms, uintptr_t stream) {
        valm::cuda_row_norms(device, rows, reinterpret_cast<float*>(norms), stream);
    });
    m.def("cuda_topk_workspace", &valm::cuda_topk_workspace);
    m.def("ip_topk_cuda", [](int device, uintptr_t queries, int64_t n_queries, const valm::Rows& rows, uintptr_t norms,
                             int k, uintptr_t workspace, uintptr_t scores, uintptr_t indices, uintptr_t stream) {
        valm::ip_topk_cuda(device, reinterpret_cast<const float*>(queries), n_queries, rows,
                           reinterpret_cast<const float*>(norms), k, reinterpret_cast<void*>(workspace),
                           reinterpret_cast<float*>(scores), reinterpret_cast<int64_t*>(indices), stream);
    });
#else
    m.attr("built_with_cuda") = false;
#endif
}
