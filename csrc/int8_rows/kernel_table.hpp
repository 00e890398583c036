// What each instruction set has a kernel for.
#pragma once

#include <cstdint>

namespace valm {

struct Int8RowKernels {
    void (*round_row)(const float* row, int64_t width, int8_t* rounded, float* step, float* zero);
    void (*scale_row)(int32_t* products, int64_t width, float step, float zero, const float* scale, const float* sum,
                      const float* bias);
};

extern const Int8RowKernels int8_rows_generic;
#if defined(__x86_64__)
extern const Int8RowKernels int8_rows_avx2, int8_rows_avx512;
#endif

}  // namespace valm
