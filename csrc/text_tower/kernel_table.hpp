// The kernels of one instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace valm {

enum class Activation { kGelu, kQuickGelu };

// Keys and values of one head, for consecutive tokens.
struct TokenSpan {
    const float *keys, *values;
    int64_t step, count;
};

// A query of one head (dim), and the tokens that it sees, at least one: of the past, new tokens, and the EOT.
struct SeenTokens {
    const float* query;
    TokenSpan spans[3];
    int64_t dim;
};

struct TextTowerKernels {
    void (*round_row)(const float* row, int64_t width, int8_t* rounded, float* step, float* zero);
    void (*scale_row)(int32_t* products, int64_t width, float step, float zero, const float* scale, const float* sum,
                      const float* bias);
    // products[i * outputs + n] of `count` rounded rows and rows first <= n < last of the weights, each of `width`
    void (*multiply)(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first,
                     int64_t last, int64_t outputs, int32_t* products);
    // out[i * outputs + n] = bias[n] + row i of `count` rows @ row n of the weights, first <= n < last
    void (*multiply_floats)(const float* rows, int64_t count, int64_t width, const float* weight, const float* bias,
                            int64_t first, int64_t last, int64_t outputs, float* out);
    // out = LayerNorm(row), all of `width`
    void (*normalise)(const float* row, int64_t width, const float* weight, const float* bias, float eps, float* out);
    // in place
    void (*activate)(float* values, int64_t count, Activation activation);
    // out (dim) = softmax(query @ keys / sqrt(dim)) @ values
    void (*attend)(const SeenTokens& seen, float* out);
};

extern const TextTowerKernels text_tower_generic;
#if defined(__x86_64__)
extern const TextTowerKernels text_tower_avx2, text_tower_avx512vnni;
#endif

// The kernels that the instruction set of that name runs; one of cpu_isas() of simd/isa.hpp.
const TextTowerKernels& text_tower_kernels(const std::string& isa);

}  // namespace valm
