// What each instruction set has a kernel for.
#pragma once

#include <cstdint>

namespace valm {

struct Int8RowKernels {
    void (*round_row)(const float* row, int64_t width, int8_t* rounded, float* step, float* zero);
    void (*scale_row)(int32_t* products, int64_t width, float step, float zero, const float* scale, const float* sum,
                      const float* bias);
    // products[i * outputs + n] of `count` rounded rows and rows first <= n < last of the weights, each of `width`
    void (*multiply)(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first,
                     int64_t last, int64_t outputs, int32_t* products);
};

extern const Int8RowKernels int8_rows_generic;
#if defined(__x86_64__)
extern const Int8RowKernels int8_rows_avx2, int8_rows_avx512, int8_rows_avx512vnni;
#endif

}  // namespace valm
