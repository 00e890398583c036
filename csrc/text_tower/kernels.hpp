// The kernels, compiled once per instruction set: each kernels_*.cpp includes this file. Everything has internal
// linkage: the linker must never hand code of one instruction set to another. The compiler vectorises the plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "simd/lanes.hpp"
#include "text_tower/kernel_table.hpp"

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
        probe += x * 0.0f;  // NaN for infinity or NaN, which comparisons would skip
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

// Unused if an instruction set defines its own.
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

// The sums of a tile of rows and outputs stay in registers.
template <int kRows>
void multiply_some_floats(const float* rows, int64_t width, const float* weight, const float* bias, int64_t first,
                          int64_t last, int64_t outputs, float* out) {
    constexpr int kOutputs = 4, kLine = 16;
    for (int64_t n = first; n < last; n += kOutputs) {
        const int64_t some = last - n < kOutputs ? last - n : kOutputs;
        const float* factor[kOutputs];
        for (int m = 0; m < kOutputs; ++m) factor[m] = weight + (n + (m < some ? m : 0)) * width;
        // prefetched, because rows of weights are too short for the processor to predict the next; harmless after the
        // last row
        const float* next = weight + (n + kOutputs) * width;
        FloatVector sums[kRows][kOutputs] = {};
        const auto add_products = [&](int64_t e, int64_t count) {
            FloatVector factors[kOutputs];
            for (int m = 0; m < kOutputs; ++m) factors[m] = load(factor[m] + e, count);
            for (int i = 0; i < kRows; ++i) {
                const FloatVector row = load(rows + i * width + e, count);
                for (int m = 0; m < kOutputs; ++m) sums[i][m] += row * factors[m];
            }
        };
        int64_t e = 0;
        for (; e + Lanes<float>::count <= width; e += Lanes<float>::count) {
            for (int64_t line = 0; line < kOutputs * Lanes<float>::count; line += kLine)
                __builtin_prefetch(next + e * kOutputs + line);
            add_products(e, Lanes<float>::count);
        }
        if (e < width) add_products(e, width - e);
        for (int i = 0; i < kRows; ++i)
            for (int64_t m = 0; m < some; ++m) out[i * outputs + n + m] = bias[n + m] + sum_of(sums[i][m]);
    }
}

void multiply_floats(const float* rows, int64_t count, int64_t width, const float* weight, const float* bias,
                     int64_t first, int64_t last, int64_t outputs, float* out) {
    for (; count >= 2; count -= 2, rows += 2 * width, out += 2 * outputs)
        multiply_some_floats<2>(rows, width, weight, bias, first, last, outputs, out);
    if (count == 1) multiply_some_floats<1>(rows, width, weight, bias, first, last, outputs, out);
}

void normalise(const float* row, int64_t width, const float* weight, const float* bias, float eps, float* out) {
    FloatVector sums = {}, squares = {};
    int64_t e = 0;
    for (; e < width; e += Lanes<float>::count) sums += load(row + e, width - e);
    const float mean = sum_of(sums) / width;
    for (e = 0; e < width; e += Lanes<float>::count) {
        const int64_t n = width - e;
        FloatVector x = load(row + e, n) - mean;
        if (n < Lanes<float>::count)
            for (int64_t lane = n; lane < Lanes<float>::count; ++lane) x[lane] = 0;
        squares += x * x;
    }
    const float factor = 1 / std::sqrt(sum_of(squares) / width + eps);
    for (e = 0; e < width; ++e) out[e] = (row[e] - mean) * factor * weight[e] + bias[e];
}

// x Phi(x), where Phi(-z) = exp(-z^2 / 2) t p(t) with t = 1 / (1 + 0.4 z / sqrt 2). The polynomial p is fitted to
// scipy's erfcx(z / sqrt 2) / t for z / sqrt 2 up to 12, with a relative error of 8e-8.
FloatVector gelu(FloatVector x) {
    const FloatVector z = x < 0.0f ? -x : x, t = 1.0f / (1.0f + z * 0.282842712f);
    FloatVector p = FloatVector{} + 0.0220776346f;
    for (const float c : {-0.0772052156f, 0.0565166552f, 0.0274309275f, 0.0512492783f, 0.0918897613f, 0.102160902f,
                          0.113053274f, 0.112826821f})
        p = p * t + c;
    const FloatVector beyond = p * t * exp_of(z * z * -0.5f);
    return x < 0.0f ? x * beyond : x - x * beyond;
}

// x / (1 + exp(-1.702 x))
FloatVector quick_gelu(FloatVector x) {
    const FloatVector e = exp_of((x < 0.0f ? x : -x) * 1.702f);
    return x < 0.0f ? x * e / (1.0f + e) : x / (1.0f + e);
}

void activate(float* values, int64_t count, Activation activation) {
    for (int64_t e = 0; e < count; e += Lanes<float>::count) {
        const FloatVector x = load(values + e, count - e);
        store(values + e, activation == Activation::kGelu ? gelu(x) : quick_gelu(x), count - e);
    }
}

float dot(const float* a, const float* b, int64_t n) {
    FloatVector sums = {};
    int64_t e = 0;
    for (; e + Lanes<float>::count <= n; e += Lanes<float>::count)
        sums += load(a + e, Lanes<float>::count) * load(b + e, Lanes<float>::count);
    if (e < n) sums += load(a + e, n - e) * load(b + e, n - e);
    return sum_of(sums);
}

// One pass over the tokens: if a score is the highest yet, the sums so far are scaled down to it.
void attend(const SeenTokens& seen, float* out) {
    const float scale = 1 / std::sqrt(static_cast<float>(seen.dim));
    float highest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t e = 0; e < seen.dim; ++e) out[e] = 0;
    for (const TokenSpan& span : seen.spans) {
        for (int64_t token = 0; token < span.count; ++token) {
            const float* value = span.values + token * span.step;
            const float score = dot(seen.query, span.keys + token * span.step, seen.dim) * scale;
            if (score > highest) {
                const float smaller = std::exp(highest - score);
                for (int64_t e = 0; e < seen.dim; ++e) out[e] *= smaller;
                sum *= smaller;
                highest = score;
            }
            const float weight = std::exp(score - highest);
            for (int64_t e = 0; e < seen.dim; ++e) out[e] += weight * value[e];
            sum += weight;
        }
    }
    for (int64_t e = 0; e < seen.dim; ++e) out[e] /= sum;
}

}  // namespace
}  // namespace valm
