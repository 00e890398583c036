// The steps of an int8 linear layer before and after its integer products: rounding the input rows, and scaling the
// products; and the whole layer for a few rows. Names are as in valm_kernels/int8_rows.py.
#pragma once

#include <cstdint>
#include <string>

namespace valm {

// Rounds float32 rows (count, width), width >= 1, to 256 steps from the least to the largest value of each row:
// rows ~ zero + step * rounded. isa is one of cpu_isas() of simd/isa.hpp.
//
// out: rounded (count, width), step (count), zero (count); step and zero of a row with NaN or infinity are NaN
void round_rows(const std::string& isa, int threads, const float* rows, int64_t count, int64_t width, int8_t* rounded,
                float* step, float* zero);

// Products (count, width) of rounded rows and rounded weights become, in place, the layer's output as float32:
// bias + step * scale * product + zero * sum, with step and zero (count) of the rows, and scale, sum and bias (width)
// of the weights.
void scale_products(const std::string& isa, int threads, int32_t* products, int64_t count, int64_t width,
                    const float* step, const float* zero, const float* scale, const float* sum, const float* bias);

// A whole layer: round_rows, the products with the rounded weights (outputs, width), and scale_products.
//
// out: (count, outputs) float32, in the memory of integers
void linear_rows(const std::string& isa, int threads, const float* rows, int64_t count, int64_t width,
                 const int8_t* weight, int64_t outputs, const float* scale, const float* sum, const float* bias,
                 int32_t* out);

}  // namespace valm
