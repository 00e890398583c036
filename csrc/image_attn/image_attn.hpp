// The image branch of visual_fusion_attn on CPU: every token's attention over its own K images, joined with a text
// part that is computed already. Formulas and names are as in valm_kernels/visual_fusion/cpu.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace valm {

// Named tensors from Python: address and strides in elements. A missing name is an absent tensor, an unknown name
// raises. The last dimension of every tensor has stride 1.
using TensorMap = std::map<std::string, std::pair<std::uintptr_t, std::vector<int64_t>>>;

struct ImageAttnSizes {
    int64_t batch, query_heads, kv_heads, queries, images, head_dim;
    int64_t pool_rows;  // the pooled layout; -1 in the dense one
};

// isa is one of cpu_isas() of simd/isa.hpp. dtype is the dtype of q, k, v, the images and their gradients: "float32",
// "float16", "bfloat16" or "float64". Other tensors ("wide") are float64 if dtype is, otherwise float32, except
// image_index (int32) and image_mask (bool).
// softcap caps the scores before image_logit_bias and image_score_bias are added; 0 = no cap.
//
// in:      q (B, Hq, T, D); image_k, image_v (B, Hkv, T, K, D) or (Hkv, U, D); image_index (B, Hkv, T, K), with a
//          stride of 0 if all heads see the same images, or image_mask (B, T, K);
//          wide image_k_bias, image_v_bias (Hkv, D), image_logit_bias (Hq), image_score_bias (B, T, K)
// in, out: out (B, Hq, T, D), wide lse (B, Hq, T): of the text when they come in, joint when they leave
// out:     wide image_scores (B, Hq, T, K) or none, -inf where there is no image
void image_attn_forward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                        double scale, double softcap, int threads, TensorMap tensors);

// in:      as above, and the joint out and lse (+inf for a query that sees nothing), grad_out, wide grad_lse and
//          grad_image_scores or none
// in, out: grad_q: the text's share comes in, the sum leaves; wide grad_image_score_bias, zeros come in, or none
// out:     grad_image_k and grad_image_v, or neither, and the wide gradients of the other biases, if given
void image_attn_backward(const std::string& isa, const std::string& dtype, const std::vector<int64_t>& sizes,
                         double scale, double softcap, int threads, TensorMap tensors);

// The instruction set whose kernels run for `isa`: with VNNI, the kernels for "avx512" run.
std::string image_attn_isa(const std::string& isa);

}  // namespace valm
