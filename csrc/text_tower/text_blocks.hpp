// The next tokens of texts in the blocks of a text tower, whose linear layers are float32 or int8. All operations are
// one call, because each is too small to be called from Python. Names are as in valm_kernels/text_blocks.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "text_tower/kernel_table.hpp"

namespace valm {

// Weights (outputs, width) and bias (outputs) in float32, or int8 weights with scale and sum (outputs), as for
// linear_rows.
struct Layer {
    const void* weight;
    const float *scale, *sum, *bias;
    bool is_int8() const { return scale != nullptr; }
};

// LayerNorm with weight and bias (width).
struct Norm {
    const float *weight, *bias;
    float eps;
};

struct TextBlock {
    int64_t width, inner_width, heads;
    Norm attention_norm, mlp_norm;
    Layer attention_in, attention_out, mlp_in, mlp_out;
    Activation activation;
};

// Keys and values (blocks, 2, texts, heads, count, width / heads) of the tokens before, with the strides of all
// dimensions except the last.
struct PastTokens {
    const float* data;
    std::array<int64_t, 5> steps;
    int64_t count;
    std::vector<int64_t> first;  // the first that each text sees; empty if each text sees all
};

// T tokens, `lengths` of each text, and then an EOT after each of the tokens `eot_after`.
struct NewTokens {
    std::vector<int64_t> lengths, eot_after;
};

// hidden (T + EOTs, width), in place. If there are EOTs, the last block does not change the tokens.
//
// out: projected (blocks, T + EOTs, 3 * width), the queries, keys and values
void text_blocks_step(const std::string& isa, int threads, const std::vector<TextBlock>& blocks, PastTokens past,
                      const NewTokens& tokens, float* hidden, float* projected);

}  // namespace valm
