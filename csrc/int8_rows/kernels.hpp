// The kernels, compiled once per instruction set: each kernels_*.cpp includes this file. All of it has internal
// linkage: the linker must never hand code of one instruction set to another. The compiler makes vectors of the plain
// loops.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "int8_rows/kernel_table.hpp"
#include "simd/vector.hpp"

namespace valm {
namespace {

void round_row(const float* row, int64_t width, int8_t* rounded, float* step, float* zero) {
    const auto smaller = [](auto a, auto b) { return a < b ? a : b; };
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    FloatVector least_lanes = FloatVector{} + row[0], largest_lanes = least_lanes, probe = {};
    int64_t e = 0;
    for (; e + Lanes<float>::count <= width; e += Lanes<float>::count) {
        FloatVector x;
        std::memcpy(&x, row + e, sizeof x);
        least_lanes = smaller(x, least_lanes);
        largest_lanes = larger(x, largest_lanes);
        probe += x * 0.0f;  // NaN from infinity or NaN, which comparisons would skip
    }
    float least = join_lanes(least_lanes, smaller), largest = join_lanes(largest_lanes, larger),
          skipped = sum_of(probe);
    for (; e < width; ++e) {
        least = smaller(row[e], least);
        largest = larger(row[e], largest);
        skipped += row[e] * 0.0f;
    }

    constexpr float kTiny = std::numeric_limits<float>::min();
    const float divisor = larger(kTiny, (largest - least) / 255 + skipped);  // a NaN stays
    *step = divisor;
    *zero = least + 128 * divisor;
    for (e = 0; e < width; ++e) {
        // rounds to an integer, ties to even, and leaves it in the last bits
        const float shifted = (row[e] - least) / divisor + 0x1.8p23f;
        uint32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        rounded[e] = static_cast<int8_t>(bits - 128);
    }
}

void scale_row(int32_t* products, int64_t width, float step, float zero, const float* scale, const float* sum,
               const float* bias) {
    for (int64_t e = 0; e < width; ++e) {
        const float result = bias[e] + static_cast<float>(products[e]) * step * scale[e] + zero * sum[e];
        std::memcpy(products + e, &result, sizeof result);
    }
}

// Unused where an instruction set has its own.
[[maybe_unused]] void multiply(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first,
                               int64_t last, int64_t outputs, int32_t* products) {
    for (int64_t n = first; n < last; ++n) {
        for (int64_t i = 0; i < count; ++i) {
            int32_t sum = 0;
            for (int64_t e = 0; e < width; ++e) sum += rows[i * width + e] * weight[n * width + e];
            products[i * outputs + n] = sum;
        }
    }
}

}  // namespace
}  // namespace valm
