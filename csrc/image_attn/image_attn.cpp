// Typed views of what Python hands over, and the choice of the instruction set.
#include "image_attn/image_attn.hpp"

#include <stdexcept>

#include "image_attn/problem.hpp"

namespace valm {

namespace {

template <typename T>
View<T> view(const TensorMap& tensors, const char* name) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) return {};
    View<T> result;
    result.data = reinterpret_cast<T*>(found->second.first);
    const std::vector<int64_t>& strides = found->second.second;
    for (size_t i = 0; i < strides.size() && i < 5; ++i) result.strides[i] = strides[i];
    return result;
}

template <typename T, typename Wide>
Problem<T, Wide> problem(const std::vector<int64_t>& sizes, double scale, int threads, const TensorMap& tensors) {
    Problem<T, Wide> p;
    p.sizes = {sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3), sizes.at(4), sizes.at(5), sizes.at(6)};
    p.scale = static_cast<Wide>(scale);
    p.threads = threads;
    for (const auto& [name, member] :
         {std::pair{"q", &Problem<T, Wide>::q}, std::pair{"out", &Problem<T, Wide>::out},
          std::pair{"grad_out", &Problem<T, Wide>::grad_out}, std::pair{"grad_q", &Problem<T, Wide>::grad_q},
          std::pair{"image_k", &Problem<T, Wide>::image_k}, std::pair{"image_v", &Problem<T, Wide>::image_v},
          std::pair{"grad_image_k", &Problem<T, Wide>::grad_image_k},
          std::pair{"grad_image_v", &Problem<T, Wide>::grad_image_v}})
        p.*member = view<T>(tensors, name);
    for (const auto& [name, member] :
         {std::pair{"lse", &Problem<T, Wide>::lse}, std::pair{"grad_lse", &Problem<T, Wide>::grad_lse},
          std::pair{"image_k_bias", &Problem<T, Wide>::image_k_bias},
          std::pair{"image_v_bias", &Problem<T, Wide>::image_v_bias},
          std::pair{"image_logit_bias", &Problem<T, Wide>::image_logit_bias},
          std::pair{"grad_image_k_bias", &Problem<T, Wide>::grad_image_k_bias},
          std::pair{"grad_image_v_bias", &Problem<T, Wide>::grad_image_v_bias},
          std::pair{"grad_image_logit_bias", &Problem<T, Wide>::grad_image_logit_bias}})
        p.*member = view<Wide>(tensors, name);
    p.image_index = view<int32_t>(tensors, "image_index");
    p.image_mask = view<bool>(tensors, "image_mask");
    return p;
}

const ImageAttnKernels& kernels(const std::string& isa) {
#if defined(__x86_64__)
    if (isa == "avx512") return image_attn_avx512;
    if (isa == "avx2") return image_attn_avx2;
#endif
    return image_attn_generic;
}

}  // namespace

std::vector<std::string> image_attn_isas() {
    std::vector<std::string> isas;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        isas.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        isas.push_back("avx2");
#endif
    isas.push_back("generic");
    return isas;
}

void image_attn_forward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                        double scale, int threads, const TensorMap& tensors) {
    if (dtype == "float32")
        kernels(isa).forward_float(problem<float, float>(sizes, scale, threads, tensors));
    else if (dtype == "bfloat16")
        kernels(isa).forward_bfloat16(problem<BFloat16, float>(sizes, scale, threads, tensors));
    else if (dtype == "float16")
        kernels(isa).forward_float16(problem<Float16, float>(sizes, scale, threads, tensors));
    else if (dtype == "float64")
        kernels(isa).forward_double(problem<double, double>(sizes, scale, threads, tensors));
    else
        throw std::invalid_argument("image_attn_forward: unknown dtype " + dtype);
}

void image_attn_backward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                         double scale, int threads, const TensorMap& tensors) {
    if (dtype == "float32")
        kernels(isa).backward_float(problem<float, float>(sizes, scale, threads, tensors));
    else if (dtype == "bfloat16")
        kernels(isa).backward_bfloat16(problem<BFloat16, float>(sizes, scale, threads, tensors));
    else if (dtype == "float16")
        kernels(isa).backward_float16(problem<Float16, float>(sizes, scale, threads, tensors));
    else if (dtype == "float64")
        kernels(isa).backward_double(problem<double, double>(sizes, scale, threads, tensors));
    else
        throw std::invalid_argument("image_attn_backward: unknown dtype " + dtype);
}

}  // namespace valm
