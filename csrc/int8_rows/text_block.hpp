// The next token of each text in a block of a text tower whose linear layers are int8: all operations of the block in
// one call, as each is too small to be called from Python. Names are those of valm_kernels/text_block.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "int8_rows/kernel_table.hpp"

namespace valm {

// Weights (outputs, width) and scale, sum and bias (outputs), as linear_rows takes them.
struct Int8Layer {
    const int8_t* weight;
    const float *scale, *sum, *bias;
};

// LayerNorm with weight and bias (width).
struct Norm {
    const float *weight, *bias;
    float eps;
};

struct TextBlock {
    int64_t width, inner_width, heads;
    Norm attention_norm, mlp_norm;
    Int8Layer attention_in, attention_out, mlp_in, mlp_out;
    Activation activation;
};

// Keys and values (texts, heads, count, width / heads) of the tokens before, with the steps from one text, head and
// token to the next.
struct PastTokens {
    const float *keys, *values;
    std::array<int64_t, 3> key_steps, value_steps;
    int64_t count;
    const int32_t* first;  // (texts), the first that each text sees; null where each sees all
};

// hidden (streams, texts, width), in place, of one or two streams; first_out is 0 or 1.
//
// out: projected (streams, texts, 3 * width), the queries, keys and values
void text_block_step(const std::string& isa, int threads, const TextBlock& block, const PastTokens& past, float* hidden,
                     int64_t texts, int64_t streams, int64_t first_out, float* projected);

}  // namespace valm
