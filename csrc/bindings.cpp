// pybind11 module valm_kernels._native: glue only. Raw pointers come in as integers (tensor.data_ptr());
// shapes and dtypes are checked in Python before.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "topk/topk.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native code of valm_kernels; call it through valm_kernels.";

    m.def(
        "ip_topk_cpu",
        [](uintptr_t queries, int64_t n_queries, uintptr_t database, int64_t n_rows, int64_t dim, int64_t k,
           int threads, uintptr_t scores, uintptr_t indices) {
            valm::ip_topk_cpu(reinterpret_cast<const float*>(queries), n_queries,
                              reinterpret_cast<const float*>(database), n_rows, dim, k, threads,
                              reinterpret_cast<float*>(scores), reinterpret_cast<int64_t*>(indices));
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("queries"), py::arg("n_queries"), py::arg("database"),
        py::arg("n_rows"), py::arg("dim"), py::arg("k"), py::arg("threads"), py::arg("scores"), py::arg("indices"));

#ifdef VALM_KERNELS_CUDA
    m.attr("built_with_cuda") = true;
    m.def("cuda_devices", &valm::cuda_devices);
#else
    m.attr("built_with_cuda") = false;
#endif
}
