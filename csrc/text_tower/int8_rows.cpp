// Threads, and the choice among the kernels of the instruction sets.
#include "text_tower/int8_rows.hpp"

#include <algorithm>
#include <vector>

#include "simd/isa.hpp"
#include "text_tower/kernel_table.hpp"

namespace valm {

namespace {

// One thread handles fewer numbers, as in PyTorch's own operations.
constexpr int64_t kNumbersPerThread = 32768;
// Outputs of a layer that a thread computes at once.
constexpr int64_t kOutputsAtOnce = 64;

}  // namespace

const TextTowerKernels& text_tower_kernels(const std::string& isa) {
    return kernels_for<TextTowerKernels>(isa, {
#if defined(__x86_64__)
                                                  {Isa::kAvx512Vnni, &text_tower_avx512vnni},
                                                  {Isa::kAvx2, &text_tower_avx2},
#endif
                                                  {Isa::kGeneric, &text_tower_generic}});
}

void round_rows(const std::string& isa, int threads, const float* rows, int64_t count, int64_t width, int8_t* rounded,
                float* step, float* zero) {
    const TextTowerKernels& chosen = text_tower_kernels(isa);
#pragma omp parallel for num_threads(threads) if (count * width > kNumbersPerThread)
    for (int64_t i = 0; i < count; ++i)
        chosen.round_row(rows + i * width, width, rounded + i * width, step + i, zero + i);
}

void scale_products(const std::string& isa, int threads, int32_t* products, int64_t count, int64_t width,
                    const float* step, const float* zero, const float* scale, const float* sum, const float* bias) {
    const TextTowerKernels& chosen = text_tower_kernels(isa);
#pragma omp parallel for num_threads(threads) if (count * width > kNumbersPerThread)
    for (int64_t i = 0; i < count; ++i)
        chosen.scale_row(products + i * width, width, step[i], zero[i], scale, sum, bias);
}

void linear_rows(const std::string& isa, int threads, const float* rows, int64_t count, int64_t width,
                 const int8_t* weight, int64_t outputs, const float* scale, const float* sum, const float* bias,
                 int32_t* out) {
    const TextTowerKernels& chosen = text_tower_kernels(isa);
    std::vector<int8_t> rounded(count * width);
    std::vector<float> step(count), zero(count);
    round_rows(isa, threads, rows, count, width, rounded.data(), step.data(), zero.data());
#pragma omp parallel for num_threads(threads) if (width * outputs > kNumbersPerThread)
    for (int64_t first = 0; first < outputs; first += kOutputsAtOnce)
        chosen.multiply(rounded.data(), count, width, weight, first, std::min(first + kOutputsAtOnce, outputs), outputs,
                        out);
    scale_products(isa, threads, out, count, outputs, step.data(), zero.data(), scale, sum, bias);
}

}  // namespace valm
