// Typed views of Python's tensors, and the choice among the kernels of the instruction sets.
#include "image_attn/image_attn.hpp"

#include <stdexcept>
#include <utility>

#include "huge_pages.hpp"
#include "image_attn/problem.hpp"
#include "simd/isa.hpp"

namespace valm {

namespace {

// Takes the named tensor out of `tensors`.
template <typename T>
View<T> take(TensorMap& tensors, const char* name) {
    const auto found = tensors.extract(name);
    if (found.empty()) return {};
    View<T> result;
    result.data = reinterpret_cast<T*>(found.mapped().first);
    const std::vector<int64_t>& strides = found.mapped().second;
    for (size_t i = 0; i < strides.size() && i < 5; ++i) result.strides[i] = strides[i];
    return result;
}

template <typename T, typename Wide>
Problem<T, Wide> problem(const std::vector<int64_t>& sizes, double scale, double softcap, int threads,
                         TensorMap tensors) {
    Problem<T, Wide> p;
    p.sizes = {sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), sizes.at(4), sizes.at(5), sizes.at(6)};
    p.scale = static_cast<Wide>(scale);
    p.softcap = static_cast<Wide>(softcap);
    p.threads = threads;
    for (const auto& [name, member] :
         {std::pair{"q", &Problem<T, Wide>::q}, std::pair{"out", &Problem<T, Wide>::out},
          std::pair{"grad_out", &Problem<T, Wide>::grad_out}, std::pair{"grad_q", &Problem<T, Wide>::grad_q},
          std::pair{"image_k", &Problem<T, Wide>::image_k}, std::pair{"image_v", &Problem<T, Wide>::image_v},
          std::pair{"grad_image_k", &Problem<T, Wide>::grad_image_k},
          std::pair{"grad_image_v", &Problem<T, Wide>::grad_image_v}})
        p.*member = take<T>(tensors, name);
    for (const auto& [name, member] :
         {std::pair{"lse", &Problem<T, Wide>::lse}, std::pair{"grad_lse", &Problem<T, Wide>::grad_lse},
          std::pair{"image_scores", &Problem<T, Wide>::image_scores},
          std::pair{"grad_image_scores", &Problem<T, Wide>::grad_image_scores},
          std::pair{"image_k_bias", &Problem<T, Wide>::image_k_bias},
          std::pair{"image_v_bias", &Problem<T, Wide>::image_v_bias},
          std::pair{"image_logit_bias", &Problem<T, Wide>::image_logit_bias},
          std::pair{"image_score_bias", &Problem<T, Wide>::image_score_bias},
          std::pair{"grad_image_k_bias", &Problem<T, Wide>::grad_image_k_bias},
          std::pair{"grad_image_v_bias", &Problem<T, Wide>::grad_image_v_bias},
          std::pair{"grad_image_logit_bias", &Problem<T, Wide>::grad_image_logit_bias},
          std::pair{"grad_image_score_bias", &Problem<T, Wide>::grad_image_score_bias}})
        p.*member = take<Wide>(tensors, name);
    p.image_index = take<int32_t>(tensors, "image_index");
    p.image_mask = take<bool>(tensors, "image_mask");
    if (!tensors.empty())
        throw std::invalid_argument("image_attn: unknown tensor '" + tensors.begin()->first +
                                    "': the native code and the Python code of valm_kernels differ in version");
    return p;
}

template <typename T, typename Wide>
void backward(void (*kernel)(const Problem<T, Wide>&), const Problem<T, Wide>& p) {
    const ImageAttnSizes& n = p.sizes;
    if (!p.pooled() && p.grad_image_k) {
        const int64_t bytes = n.batch * n.kv_heads * n.queries * n.images * n.head_dim * int64_t{sizeof(T)};
        // With pages of 4 KiB page faults cost more than the kernel: writing two fresh gradients of 100 MB took 126
        // ms, and 47 ms with huge pages.
        use_huge_pages(p.grad_image_k.data, bytes);
        use_huge_pages(p.grad_image_v.data, bytes);
    }
    kernel(p);
}

const ImageAttnKernels& kernels(const std::string& isa) {
    return kernels_for<ImageAttnKernels>(isa, {
#if defined(__x86_64__)
                                                  {Isa::kAvx512, &image_attn_avx512},
                                                  {Isa::kAvx2, &image_attn_avx2},
#endif
                                                  {Isa::kGeneric, &image_attn_generic}});
}

}  // namespace

std::string image_attn_isa(const std::string& isa) { return kernels(isa).isa; }

void image_attn_forward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                        double scale, double softcap, int threads, TensorMap tensors) {
    if (dtype == "float32")
        kernels(isa).forward_float(problem<float, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "bfloat16")
        kernels(isa).forward_bfloat16(problem<BFloat16, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "float16")
        kernels(isa).forward_float16(problem<Float16, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "float64")
        kernels(isa).forward_double(problem<double, double>(sizes, scale, softcap, threads, std::move(tensors)));
    else
        throw std::invalid_argument("image_attn_forward: unknown dtype " + dtype);
}

void image_attn_backward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                         double scale, double softcap, int threads, TensorMap tensors) {
    if (dtype == "float32")
        backward(kernels(isa).backward_float,
                 problem<float, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "bfloat16")
        backward(kernels(isa).backward_bfloat16,
                 problem<BFloat16, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "float16")
        backward(kernels(isa).backward_float16,
                 problem<Float16, float>(sizes, scale, softcap, threads, std::move(tensors)));
    else if (dtype == "float64")
        backward(kernels(isa).backward_double,
                 problem<double, double>(sizes, scale, softcap, threads, std::move(tensors)));
    else
        throw std::invalid_argument("image_attn_backward: unknown dtype " + dtype);
}

}  // namespace valm
