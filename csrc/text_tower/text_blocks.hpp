// The next tokens of texts in the blocks of a text tower, whose linear layers are float32 or int8: all operations in
// one call, as each is too small to be called from Python. Names are those of valm_kernels/text_blocks.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "text_tower/kernel_table.hpp"

namespace valm {

// Weights (outputs, width) and bias (outputs), float32; or int8 with scale and sum (outputs), as linear_rows takes
// them.
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

// Keys and values (blocks, 2, texts, heads, count, width / heads) of the tokens before, with the steps from one to the
// next in all but the last.
struct PastTokens {
    const float* data;
    std::array<int64_t, 5> steps;
    int64_t count;
    std::vector<int64_t> first;  // that each text sees; empty where each sees all
};

// T tokens, `lengths` of each text, and then an EOT behind each of the tokens `eot_after`.
struct NewTokens {
    std::vector<int64_t> lengths, eot_after;
};

// hidden (T + EOTs, width), in place; in the last block tokens stay as they are if there are EOTs.
//
// out: projected (blocks, T + EOTs, 3 * width), the queries, keys and values
void text_blocks_step(const std::string& isa, int threads, const std::vector<TextBlock>& blocks, PastTokens past,
                      const NewTokens& tokens, float* hidden, float* projected);

}  // namespace valm
