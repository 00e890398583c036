// The kernels' arguments: sizes and typed views. Shared by the dispatch and the kernels of every instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "image_attn/image_attn.hpp"
#include "simd/half.hpp"

namespace valm {

// Always inlined into its caller, so that no copy for one instruction set can be linked into another's code.
#define VALM_INLINE inline __attribute__((always_inline))

// A strided tensor of at most five dimensions. The last dimension has stride 1, and callers walk it.
template <typename T>
struct View {
    T* data = nullptr;
    int64_t strides[5] = {};

    VALM_INLINE explicit operator bool() const { return data != nullptr; }

    // Whether every row starts at a multiple of `bytes`.
    VALM_INLINE bool aligned(int64_t bytes) const {
        int64_t offsets = reinterpret_cast<std::uintptr_t>(data);
        for (int i = 0; i < 4; ++i) offsets |= strides[i] * int64_t{sizeof(T)};
        return offsets % bytes == 0;
    }

    template <typename... Index>
    VALM_INLINE T* at(Index... index) const {
        const int64_t indices[] = {index...};
        int64_t offset = 0;
        for (unsigned i = 0; i < sizeof...(index); ++i) offset += indices[i] * strides[i];
        return data + offset;
    }
};

// T is the dtype of the tensors, Wide the type of all sums.
template <typename T, typename Wide>
struct Problem {
    ImageAttnSizes sizes;
    Wide scale;
    Wide softcap;  // 0 = none
    int threads;
    View<T> q, out, grad_out, grad_q, image_k, image_v, grad_image_k, grad_image_v;
    View<int32_t> image_index;
    View<bool> image_mask;
    View<Wide> lse, grad_lse, image_scores, grad_image_scores;
    View<Wide> image_k_bias, image_v_bias, image_logit_bias, image_score_bias;
    View<Wide> grad_image_k_bias, grad_image_v_bias, grad_image_logit_bias, grad_image_score_bias;

    VALM_INLINE bool pooled() const { return sizes.pool_rows >= 0; }

    // Whether each head sees its own images.
    VALM_INLINE bool by_head() const { return image_index.strides[1] != 0; }

    VALM_INLINE bool has_image(int64_t b, int64_t head, int64_t i, int64_t k) const {
        if (pooled()) return *image_index.at(b, head, i, k) >= 0;
        return !image_mask || *image_mask.at(b, i, k);
    }

    // The row of image k of query i among `images`, which is image_k, image_v or one of their gradients.
    VALM_INLINE T* image_row(const View<T>& images, int64_t b, int64_t head, int64_t i, int64_t k) const {
        if (pooled()) return images.at(head, static_cast<int64_t>(*image_index.at(b, head, i, k)));
        return images.at(b, head, i, k);
    }
};

// One set of kernels per instruction set.
struct ImageAttnKernels {
    const char* isa;
    void (*forward_float)(const Problem<float, float>&);
    void (*forward_bfloat16)(const Problem<BFloat16, float>&);
    void (*forward_float16)(const Problem<Float16, float>&);
    void (*forward_double)(const Problem<double, double>&);
    void (*backward_float)(const Problem<float, float>&);
    void (*backward_bfloat16)(const Problem<BFloat16, float>&);
    void (*backward_float16)(const Problem<Float16, float>&);
    void (*backward_double)(const Problem<double, double>&);
};

extern const ImageAttnKernels image_attn_generic;
#if defined(__x86_64__)
extern const ImageAttnKernels image_attn_avx2;
extern const ImageAttnKernels image_attn_avx512;
#endif

}  // namespace valm
