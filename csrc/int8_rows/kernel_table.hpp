// What each instruction set has a kernel for.
#pragma once

#include <cstdint>
#include <string>

namespace valm {

enum class Activation { kGelu, kQuickGelu };

// A query of one head (dim) and what it sees: tokens `first` to `count` of the past, and own_count >= 1 new ones.
struct SeenTokens {
    const float *query, *keys, *values;
    int64_t key_step, value_step, first, count;
    const float *own_keys[2], *own_values[2];
    int64_t own_count, dim;
};

struct Int8RowKernels {
    void (*round_row)(const float* row, int64_t width, int8_t* rounded, float* step, float* zero);
    void (*scale_row)(int32_t* products, int64_t width, float step, float zero, const float* scale, const float* sum,
                      const float* bias);
    // products[i * outputs + n] of `count` rounded rows and rows first <= n < last of the weights, each of `width`
    void (*multiply)(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first,
                     int64_t last, int64_t outputs, int32_t* products);
    // out = LayerNorm(row), all of `width`
    void (*normalise)(const float* row, int64_t width, const float* weight, const float* bias, float eps, float* out);
    // in place
    void (*activate)(float* values, int64_t count, Activation activation);
    // out (dim) = softmax(query @ keys / sqrt(dim)) @ values
    void (*attend)(const SeenTokens& seen, float* out);
};

extern const Int8RowKernels int8_rows_generic;
#if defined(__x86_64__)
extern const Int8RowKernels int8_rows_avx2, int8_rows_avx512vnni;
#endif

// The kernels that the instruction set of that name runs; one of cpu_isas() of simd/isa.hpp.
const Int8RowKernels& int8_row_kernels(const std::string& isa);

}  // namespace valm
