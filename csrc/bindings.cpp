// pybind11 module valm_kernels._native: glue only. Raw pointers come in as integers (tensor.data_ptr());
// Python has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda_obstacle.hpp"  // setup.py writes it
#include "image_attn/image_attn.hpp"
#include "simd/isa.hpp"
#include "text_tower/int8_rows.hpp"
#include "text_tower/text_blocks.hpp"
#include "topk/cuda/search.hpp"
#include "topk/topk.hpp"

namespace py = pybind11;

template <class T>
static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Calls function(interrupted) without the GIL, and raises the exception of a signal handler that ran meanwhile.
template <class Function>
static int64_t interruptible(Function function) {
    int64_t result;
    {
        py::gil_scoped_release release;
        result = function([] {
            py::gil_scoped_acquire gil;
            return PyErr_CheckSignals() != 0;
        });
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    return result;
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native code of valm_kernels; call it through valm_kernels.";
    // Raise it here and in valm_kernels/native.py whenever a call changes.
    m.attr("interface_version") = 10;

    py::class_<valm::Rows>(m, "Rows", py::module_local())
        .def(py::init([](uintptr_t data, uintptr_t scale, const std::string& dtype, int64_t count, int64_t dim) {
            return valm::Rows{at<void>(data), at<float>(scale), valm::element_of(dtype), count, dim};
        }));
    py::class_<valm::PackedRows>(m, "PackedRows", py::module_local())
        .def(py::init([](uintptr_t codes, uintptr_t stats, uintptr_t centre, uintptr_t axis, int64_t count,
                         uintptr_t row, uintptr_t next_duplicate) {
            return valm::PackedRows{
                at<uint8_t>(codes), at<float>(stats),           at<float>(centre), at<float>(axis), count,
                at<int32_t>(row),   at<int32_t>(next_duplicate)};
        }));
    m.def("cpu_isas", &valm::cpu_isas);
    m.def("amx_obstacle", [] { return valm::amx_obstacle(); });
    m.def("find_duplicates", [](const valm::Rows& rows, int threads, uintptr_t row, uintptr_t next_duplicate) {
        return interruptible([&](const auto& interrupted) {
            return valm::find_duplicates(rows, threads, at<int32_t>(row), at<int32_t>(next_duplicate), interrupted);
        });
    });
    m.def("pack", [](const valm::Rows& rows, const valm::PackedRows& packed, int64_t first_panel,
                     const std::string& isa, int threads) {
        return interruptible(
            [&](const auto& interrupted) { return valm::pack(rows, packed, first_panel, isa, threads, interrupted); });
    });
    m.def("ip_topk_cpu", [](uintptr_t queries, int64_t n_queries, const valm::Rows& rows, int64_t n_databases,
                            const valm::PackedRows* packed, int64_t k, const std::string& isa, int threads,
                            uintptr_t scores, uintptr_t indices, uintptr_t allowed) {
        return interruptible([&](const auto& interrupted) {
            return valm::ip_topk_cpu(at<float>(queries), n_queries, rows, n_databases, packed, k, at<bool>(allowed),
                                     isa, threads, interrupted, at<float>(scores), at<int64_t>(indices));
        });
    });
    m.def("ip_scores_cpu", [](uintptr_t queries, const valm::Rows& rows, int64_t n_pairs, uintptr_t query_ids,
                              uintptr_t row_ids, const std::string& isa, int threads, uintptr_t scores) {
        const py::gil_scoped_release release;
        valm::ip_scores_cpu(at<float>(queries), rows, n_pairs, at<int64_t>(query_ids), at<int64_t>(row_ids), isa,
                            threads, at<float>(scores));
    });

    m.def("image_attn_forward", &valm::image_attn_forward, py::call_guard<py::gil_scoped_release>());
    m.def("image_attn_backward", &valm::image_attn_backward, py::call_guard<py::gil_scoped_release>());
    m.def("image_attn_isa", &valm::image_attn_isa);

    m.def("round_rows", [](const std::string& isa, int threads, uintptr_t rows, int64_t count, int64_t width,
                           uintptr_t rounded, uintptr_t step, uintptr_t zero) {
        const py::gil_scoped_release release;
        valm::round_rows(isa, threads, at<float>(rows), count, width, at<int8_t>(rounded), at<float>(step),
                         at<float>(zero));
    });
    m.def("scale_products", [](const std::string& isa, int threads, uintptr_t products, int64_t count, int64_t width,
                               uintptr_t step, uintptr_t zero, uintptr_t scale, uintptr_t sum, uintptr_t bias) {
        const py::gil_scoped_release release;
        valm::scale_products(isa, threads, at<int32_t>(products), count, width, at<float>(step), at<float>(zero),
                             at<float>(scale), at<float>(sum), at<float>(bias));
    });
    m.def("linear_rows",
          [](const std::string& isa, int threads, uintptr_t rows, int64_t count, int64_t width, uintptr_t weight,
             int64_t outputs, uintptr_t scale, uintptr_t sum, uintptr_t bias, uintptr_t out) {
              const py::gil_scoped_release release;
              valm::linear_rows(isa, threads, at<float>(rows), count, width, at<int8_t>(weight), outputs,
                                at<float>(scale), at<float>(sum), at<float>(bias), at<int32_t>(out));
          });
    m.def("text_blocks_step",
          [](const std::string& isa, int threads, int64_t width, int64_t inner_width, int64_t heads, bool quick_gelu,
             const std::vector<std::array<uintptr_t, 20>>& weights, const std::vector<std::array<float, 2>>& eps,
             uintptr_t past, const std::array<int64_t, 5>& steps, int64_t count, const std::vector<int64_t>& first,
             const std::vector<int64_t>& lengths, const std::vector<int64_t>& eot_after, uintptr_t hidden,
             uintptr_t projected) {
              const py::gil_scoped_release release;
              const auto activation = quick_gelu ? valm::Activation::kQuickGelu : valm::Activation::kGelu;
              std::vector<valm::TextBlock> blocks;
              for (size_t n = 0; n < weights.size(); ++n) {
                  const auto norm = [&](int i) {
                      return valm::Norm{at<float>(weights[n][2 * i]), at<float>(weights[n][2 * i + 1]), eps[n][i]};
                  };
                  const auto layer = [&](int i) {
                      const uintptr_t* of_layer = &weights[n][4 + 4 * i];
                      return valm::Layer{at<void>(of_layer[0]), at<float>(of_layer[1]), at<float>(of_layer[2]),
                                         at<float>(of_layer[3])};
                  };
                  blocks.push_back({width, inner_width, heads, norm(0), norm(1), layer(0), layer(1), layer(2), layer(3),
                                    activation});
              }
              valm::text_blocks_step(isa, threads, blocks, {at<float>(past), steps, count, first}, {lengths, eot_after},
                                     at<float>(hidden), at<float>(projected));
          });

#ifdef VALM_KERNELS_CUDA
    m.attr("built_with_cuda") = true;
    m.attr("oldest_capability") = VALM_KERNELS_CUDA;  // 80 for 8.0; newer GPUs compile what they have no code for
    m.def("cuda_devices", &valm::cuda_devices);
    m.def("cuda_row_norms", &valm::cuda_row_norms);
    m.def("cuda_topk_workspace", &valm::cuda_topk_workspace);
    m.def("ip_topk_cuda", &valm::ip_topk_cuda);
#else
    m.attr("built_with_cuda") = false;
#endif
    m.attr("cuda_obstacle") = VALM_KERNELS_CUDA_OBSTACLE;  // why it was built without CUDA; "" if it was built with it
}
