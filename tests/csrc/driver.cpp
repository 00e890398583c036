// The native CPU code without Python, held against plain loops: top-K search of every stored dtype, packed and not,
// image attention forward and backward in both layouts, and the rows of int8 layers; and the step of a text tower, held
// against that of each text alone. Each is called by several threads at once with the same inputs, and each call has
// threads of its own. Prints what it ran and "ok"; exits with 1 at a difference.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "image_attn/image_attn.hpp"
#include "simd/half.hpp"
#include "simd/isa.hpp"
#include "text_tower/int8_rows.hpp"
#include "text_tower/text_blocks.hpp"
#include "topk/exact.hpp"
#include "topk/topk.hpp"

namespace {

uint32_t state = 1;
float uniform() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) * 0x1p-23f - 1;
}

std::vector<float> uniforms(int64_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = uniform();
    return values;
}

void check(bool right, const char* what) {
    if (right) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

bool never() { return false; }

// Calls function() in several threads at once.
template <class Function>
void at_once(const Function& function) {
    std::vector<std::thread> threads;
    for (int n = 0; n < 3; ++n) threads.emplace_back([&function] { function(); });
    for (std::thread& thread : threads) thread.join();
}

// The k best rows by (score falling, row rising), by sorting all of them.
template <class Value>
void check_search(const char* dtype, const std::string& isa, const std::vector<Value>& rows, const float* scale,
                  int64_t dim, float (*as_float)(Value)) {
    constexpr int64_t kQueries = 5, kBest = 9;
    const int64_t count = static_cast<int64_t>(rows.size()) / dim;
    const valm::Rows stored{rows.data(), scale, valm::element_of(dtype), count, dim};
    const std::vector<float> queries = uniforms(kQueries * dim);

    const auto allowed = std::make_unique<bool[]>(count);
    for (int64_t i = 0; i < count; ++i) allowed[i] = i % 3 == 1;

    std::vector<int32_t> first(count), next(count);
    const int64_t different = valm::find_duplicates(stored, 2, first.data(), next.data(), never);
    const int64_t panels = (different + valm::kPanelRows - 1) / valm::kPanelRows;
    std::vector<uint8_t> codes(panels * ((dim + 3) / 4) * valm::kPanelRows * 4);
    std::vector<float> stats(panels * valm::kStats * valm::kPanelRows), centre(dim), axis(dim);
    const valm::PackedRows packed{codes.data(), stats.data(), centre.data(), axis.data(),
                                  different,    first.data(), next.data()};
    check(valm::pack(stored, packed, 0, isa, 2, never) == -1, "pack");

    at_once([&] {
        for (const valm::PackedRows* first_pass : {&packed, static_cast<const valm::PackedRows*>(nullptr)}) {
            for (const int64_t n_queries : {int64_t{1}, kQueries}) {
                std::vector<float> scores(n_queries * kBest);
                std::vector<int64_t> indices(n_queries * kBest);
                const bool* const filter = n_queries == 1 ? allowed.get() : nullptr;
                const int64_t broken = valm::ip_topk_cpu(queries.data(), n_queries, stored, 1, first_pass, kBest,
                                                         filter, isa, 2, never, scores.data(), indices.data());
                check(broken == -1, "ip_topk_cpu");
                for (int64_t q = 0; q < n_queries; ++q) {
                    std::vector<float> all(count);
                    for (int64_t i = 0; i < count; ++i) {
                        const auto row = [&](int64_t e) {
                            return as_float(rows[i * dim + e]) * (scale == nullptr ? 1.0f : scale[i]);
                        };
                        double lanes[valm::kExactLanes] = {};
                        for (int64_t e = 0; e < dim; ++e)
                            lanes[e % valm::kExactLanes] += double{queries[q * dim + e]} * row(e);
                        for (int step = valm::kExactLanes / 2; step > 0; step /= 2) {
                            for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
                        }
                        all[i] = static_cast<float>(lanes[0]) + 0.0f;
                    }
                    std::vector<int64_t> order(count);
                    std::iota(order.begin(), order.end(), 0);
                    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return all[a] > all[b]; });
                    if (filter != nullptr) {
                        const auto forbidden = [&](int64_t i) { return !filter[i]; };
                        order.erase(std::remove_if(order.begin(), order.end(), forbidden), order.end());
                    }
                    for (int64_t i = 0; i < kBest; ++i) {
                        check(indices[q * kBest + i] == order[i], "row of ip_topk_cpu");
                        check(scores[q * kBest + i] == all[order[i]], "score of ip_topk_cpu");
                    }
                }
            }
        }
    });
    std::printf("top-K of %s rows on %s\n", dtype, isa.c_str());
}

// Several databases in one call: what each gives alone. One row of the last is not finite.
void check_several_searches(const std::string& isa) {
    constexpr int64_t kDatabases = 5, kQueries = 7, kBest = 40, kCount = 90, kDim = 37;
    std::vector<float> rows = uniforms(kDatabases * kCount * kDim);
    const std::vector<float> queries = uniforms(kDatabases * kQueries * kDim);
    const valm::Rows first{rows.data(), nullptr, valm::element_of("float32"), kCount, kDim};
    for (const int threads : {1, 2, 8}) {
        std::vector<float> scores(kDatabases * kQueries * kBest), alone(kQueries * kBest);
        std::vector<int64_t> indices(kDatabases * kQueries * kBest), alone_indices(kQueries * kBest);
        const auto search = [&] {
            return valm::ip_topk_cpu(queries.data(), kQueries, first, kDatabases, nullptr, kBest, nullptr, isa, threads,
                                     never, scores.data(), indices.data());
        };
        check(search() == -1, "ip_topk_cpu of several databases");
        for (int64_t d = 0; d < kDatabases; ++d) {
            valm::Rows one = first;
            one.data = rows.data() + d * kCount * kDim;
            valm::ip_topk_cpu(queries.data() + d * kQueries * kDim, kQueries, one, 1, nullptr, kBest, nullptr, isa, 1,
                              never, alone.data(), alone_indices.data());
            check(std::equal(alone.begin(), alone.end(), &scores[d * kQueries * kBest]), "scores of a database");
            check(std::equal(alone_indices.begin(), alone_indices.end(), &indices[d * kQueries * kBest]),
                  "rows of a database");
        }
        const int64_t bad = (kDatabases - 1) * kCount + 3;
        rows[bad * kDim + 1] = INFINITY;
        check(search() == bad, "a row that is not finite, among several databases");
        rows[bad * kDim + 1] = 0.5f;
    }
    std::printf("top-K of several databases on %s\n", isa.c_str());
}

float same(float value) { return value; }
float from_byte(int8_t value) { return value; }
// Conversions by other means than those of simd/half.hpp; to 16 bits by truncation.
uint16_t to_half(float value) {
    const float scaled = value * 0x1p-112f;
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    return static_cast<uint16_t>((bits >> 31 << 15) | ((bits & 0x7fffffffu) >> 13));
}
float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return static_cast<float>(half >> 15 ? -magnitude : magnitude);
}
uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}
float from_bfloat(uint16_t bfloat) {
    const uint32_t bits = uint32_t{bfloat} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

void check_searches(const std::string& isa) {
    constexpr int64_t kCount = 700, kDim = 77;
    std::vector<float> rows = uniforms(kCount * kDim);
    for (int64_t i = 500; i < 520; ++i) std::copy_n(rows.data() + kDim * 3, kDim, rows.data() + kDim * i);
    check_search<float>("float32", isa, rows, nullptr, kDim, same);
    std::vector<uint16_t> halves, bfloats;
    std::vector<int8_t> bytes;
    for (const float value : rows) {
        halves.push_back(to_half(value));
        bfloats.push_back(to_bfloat(value));
        bytes.push_back(static_cast<int8_t>(value * 127));
    }
    check_search<uint16_t>("float16", isa, halves, nullptr, kDim, from_half);
    check_search<uint16_t>("bfloat16", isa, bfloats, nullptr, kDim, from_bfloat);
    std::vector<float> scale = uniforms(kCount);
    for (float& value : scale) value = std::abs(value) + 0.1f;
    for (int64_t i = 500; i < 520; ++i) scale[i] = scale[3];
    check_search<int8_t>("int8", isa, bytes, scale.data(), kDim, from_byte);
}

valm::TensorMap::mapped_type tensor(const void* data, std::vector<int64_t> strides) {
    return {reinterpret_cast<std::uintptr_t>(data), std::move(strides)};
}

// One head of width D, T tokens with K images each; the pooled layout where `pooled`, with K of U rows.
void check_image_attn(const std::string& isa, int64_t D, bool pooled) {
    constexpr int64_t T = 37, K = 5, U = 11;
    const int64_t image_rows = pooled ? U : T * K;
    const float scale = 1 / std::sqrt(static_cast<float>(D));
    const std::vector<float> q = uniforms(T * D), keys = uniforms(image_rows * D), values = uniforms(image_rows * D);
    const std::vector<float> text_out = uniforms(T * D), text_lse = uniforms(T), grad_out = uniforms(T * D);
    std::vector<int32_t> index(T * K);  // -1: no image
    for (int64_t s = 0; s < T * K; ++s) index[s] = static_cast<int32_t>(s * 7 % (U + 1)) - 1;
    std::vector<char> mask(T * K);
    for (int64_t s = 0; s < T * K; ++s) mask[s] = index[s] >= 0;
    const auto row_of = [&](int64_t s) { return pooled ? int64_t{index[s]} : s; };

    at_once([&] {
        std::vector<float> out = text_out, lse = text_lse;
        std::vector<float> grad_q(T * D), grad_keys(image_rows * D, 7), grad_values(image_rows * D, 7);
        const std::vector<int64_t> sizes = {1, 1, 1, T, K, D, pooled ? U : -1};
        const std::vector<int64_t> image_strides =
            pooled ? std::vector<int64_t>{U * D, D, 1} : std::vector<int64_t>{T * K * D, T * K * D, K * D, D, 1};
        valm::TensorMap tensors = {
            {"q", tensor(q.data(), {T * D, T * D, D, 1})},
            {"out", tensor(out.data(), {T * D, T * D, D, 1})},
            {"lse", tensor(lse.data(), {T, T, 1})},
            {"image_k", tensor(keys.data(), image_strides)},
            {"image_v", tensor(values.data(), image_strides)},
        };
        if (pooled) {
            tensors["image_index"] = tensor(index.data(), {T * K, 0, K, 1});
        } else {
            tensors["image_mask"] = tensor(mask.data(), {T * K, K, 1});
        }
        valm::image_attn_forward(isa, "float32", sizes, scale, 0.0, 2, tensors);
        tensors["grad_out"] = tensor(grad_out.data(), {T * D, T * D, D, 1});
        tensors["grad_q"] = tensor(grad_q.data(), {T * D, T * D, D, 1});
        tensors["grad_image_k"] = tensor(grad_keys.data(), image_strides);
        tensors["grad_image_v"] = tensor(grad_values.data(), image_strides);
        valm::image_attn_backward(isa, "float32", sizes, scale, 0.0, 2, tensors);

        const auto near = [](double found, double expected) { return std::abs(found - expected) < 1e-5; };
        std::vector<double> key_sums(image_rows * D), value_sums(image_rows * D);
        for (int64_t i = 0; i < T; ++i) {
            std::vector<double> weights(K);
            double sum = std::exp(text_lse[i]);
            for (int64_t k = 0; k < K; ++k) {
                if (index[i * K + k] < 0) continue;
                double product = 0;
                for (int64_t d = 0; d < D; ++d) product += double{q[i * D + d]} * keys[row_of(i * K + k) * D + d];
                sum += weights[k] = std::exp(scale * product);
            }
            check(near(lse[i], std::log(sum)), "lse of image_attn_forward");
            double delta = 0;
            for (int64_t d = 0; d < D; ++d) {
                double expected = std::exp(text_lse[i]) / sum * text_out[i * D + d];
                for (int64_t k = 0; k < K; ++k) {
                    if (weights[k] > 0) expected += weights[k] / sum * values[row_of(i * K + k) * D + d];
                }
                check(near(out[i * D + d], expected), "out of image_attn_forward");
                delta += expected * grad_out[i * D + d];
            }
            std::vector<double> expected_grad_q(D);
            for (int64_t k = 0; k < K; ++k) {
                if (weights[k] == 0) continue;
                const int64_t row = row_of(i * K + k);
                double grad_score = -delta;
                for (int64_t d = 0; d < D; ++d) grad_score += double{grad_out[i * D + d]} * values[row * D + d];
                grad_score *= weights[k] / sum * scale;
                for (int64_t d = 0; d < D; ++d) {
                    expected_grad_q[d] += grad_score * keys[row * D + d];
                    key_sums[row * D + d] += grad_score * q[i * D + d];
                    value_sums[row * D + d] += weights[k] / sum * grad_out[i * D + d];
                }
            }
            for (int64_t d = 0; d < D; ++d) check(near(grad_q[i * D + d], expected_grad_q[d]), "grad_q");
        }
        for (int64_t e = 0; e < image_rows * D; ++e) {
            check(near(grad_keys[e], key_sums[e]), "grad_image_k");
            check(near(grad_values[e], value_sums[e]), "grad_image_v");
        }
    });
    std::printf("image attention of width %d, %s, on %s\n", static_cast<int>(D), pooled ? "pooled" : "dense",
                isa.c_str());
}

// More numbers than one thread is left with, in rows that end within a vector.
void check_int8_rows(const std::string& isa) {
    constexpr int64_t kCount = 600, kWidth = 77;
    const std::vector<float> rows = uniforms(kCount * kWidth);
    const std::vector<float> scale = uniforms(kWidth), sum = uniforms(kWidth), bias = uniforms(kWidth);
    constexpr int64_t kRows = 7, kOutputs = 131;
    const std::vector<float> of_weights = uniforms(3 * kOutputs);
    at_once([&] {
        std::vector<int8_t> rounded(kCount * kWidth);
        std::vector<float> step(kCount), zero(kCount);
        valm::round_rows(isa, 2, rows.data(), kCount, kWidth, rounded.data(), step.data(), zero.data());
        std::vector<int32_t> products(kCount * kWidth);
        for (int64_t i = 0; i < kCount; ++i) {
            const float* row = rows.data() + i * kWidth;
            const auto [least, largest] = std::minmax_element(row, row + kWidth);
            check(step[i] == (*largest - *least) / 255, "step of round_rows");
            check(zero[i] == *least + 128 * step[i], "zero of round_rows");
            for (int64_t e = 0; e < kWidth; ++e) {
                const float expected = std::nearbyint((row[e] - *least) / step[i]) - 128;
                check(static_cast<float>(rounded[i * kWidth + e]) == expected, "round_rows");
                products[i * kWidth + e] = rounded[i * kWidth + e] * 1000;
            }
        }
        std::vector<int32_t> out = products;
        valm::scale_products(isa, 2, out.data(), kCount, kWidth, step.data(), zero.data(), scale.data(), sum.data(),
                             bias.data());
        for (int64_t i = 0; i < kCount * kWidth; ++i) {
            const int64_t row = i / kWidth, e = i % kWidth;
            float found;
            std::memcpy(&found, &out[i], sizeof found);
            const double expected = bias[e] + double{step[row]} * scale[e] * products[i] + double{zero[row]} * sum[e];
            check(std::abs(found - expected) < 1e-3, "scale_products");
        }

        std::vector<int8_t> weight(kOutputs * kWidth);
        for (size_t e = 0; e < weight.size(); ++e) weight[e] = static_cast<int8_t>(e * 37 % 255 - 127);
        const float *scales = of_weights.data(), *sums = scales + kOutputs, *biases = sums + kOutputs;
        std::vector<int32_t> whole(kRows * kOutputs), parts(kRows * kOutputs);
        valm::linear_rows(isa, 2, rows.data(), kRows, kWidth, weight.data(), kOutputs, scales, sums, biases,
                          whole.data());
        for (int64_t i = 0; i < kRows * kOutputs; ++i)
            for (int64_t e = 0; e < kWidth; ++e)
                parts[i] += rounded[i / kOutputs * kWidth + e] * weight[i % kOutputs * kWidth + e];
        valm::scale_products(isa, 2, parts.data(), kRows, kOutputs, step.data(), zero.data(), scales, sums, biases);
        check(whole == parts, "linear_rows");
    });
    std::printf("rows of int8 layers on %s\n", isa.c_str());
}

// A text among others has the bits that it has alone.
void check_text_blocks(const std::string& isa) {
    constexpr int64_t kHeads = 4, kDim = 19, kWidth = kHeads * kDim, kInner = 500, kPast = 37, kOfText = kWidth * kPast;
    std::vector<int8_t> weight(kWidth * kInner);
    for (size_t e = 0; e < weight.size(); ++e) weight[e] = static_cast<int8_t>(e * 37 % 255 - 127);
    std::vector<float> factors = uniforms(3 * kInner);
    for (float& factor : factors) factor /= 64 * kWidth;
    const std::vector<float> weights = uniforms(kWidth * kInner);
    const valm::Layer of_int8{weight.data(), factors.data(), &factors[kInner], &factors[2 * kInner]};
    const valm::Layer of_float{weights.data(), nullptr, nullptr, factors.data()};
    const valm::Norm norm{factors.data(), &factors[kWidth], 1e-5f};
    const valm::NewTokens tokens{{1, 3, 2}, {0, 2, 3, 5}}, of_text[] = {{{1}, {0}}, {{3}, {1, 2}}, {{2}, {1}}};
    const std::vector<int64_t> rows[] = {{0, 6}, {1, 2, 3, 7, 8}, {4, 5, 9}}, first = {0, 5, kPast};
    const std::vector<float> past = uniforms(2 * 2 * 3 * kOfText), hidden = uniforms(10 * kWidth);
    const std::array<int64_t, 5> steps = {6 * kOfText, 3 * kOfText, kOfText, kDim * kPast, kDim};
    for (const valm::Layer& layer : {of_int8, of_float}) {
        const auto activation = layer.is_int8() ? valm::Activation::kGelu : valm::Activation::kQuickGelu;
        const valm::TextBlock block{kWidth, kInner, kHeads, norm, norm, layer, layer, layer, layer, activation};
        at_once([&] {
            std::vector<float> together = hidden, projected(2 * 10 * 3 * kWidth);
            valm::text_blocks_step(isa, 2, {block, block}, {past.data(), steps, kPast, first}, tokens, together.data(),
                                   projected.data());
            std::vector<float> first_ones = hidden;
            valm::text_blocks_step(isa, 2, {block, block}, {nullptr, steps, 0, {}}, tokens, first_ones.data(),
                                   projected.data());
            for (int64_t text = 0; text < 3; ++text) {
                std::vector<float> alone;
                for (const int64_t row : rows[text])
                    alone.insert(alone.end(), &hidden[row * kWidth], &hidden[row * kWidth] + kWidth);
                valm::text_blocks_step(isa, 2, {block, block}, {&past[text * kOfText], steps, kPast, {first[text]}},
                                       of_text[text], alone.data(), projected.data());
                for (size_t i = 0; i < rows[text].size(); ++i) {
                    const float* found = &together[rows[text][i] * kWidth];
                    check(std::equal(found, found + kWidth, &alone[i * kWidth]), "text_blocks_step");
                }
            }
        });
    }
    std::printf("blocks of text towers on %s\n", isa.c_str());
}

// Every 16-bit float that is finite comes back from float32 as it was.
void check_halves() {
    using namespace valm;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = static_cast<uint16_t>(bits);
        if ((half & 0x7c00) != 0x7c00) {
            check(half_to_float(half) == from_half(half), "half_to_float");
            const HalfBitsVector all = HalfBitsVector{} + half;
            check(widen_float16(all)[0] == from_half(half), "widen_float16");
            check(narrow_float16(widen_float16(all))[1] == half, "narrow_float16");
        }
        if ((half & 0x7f80) != 0x7f80) {
            const HalfBitsVector all = HalfBitsVector{} + half;
            check(widen_bfloat16(all)[0] == from_bfloat(half), "widen_bfloat16");
            check(narrow_bfloat16(widen_bfloat16(all))[1] == half, "narrow_bfloat16");
        }
    }
    std::printf("16-bit floats\n");
}

}  // namespace

int main() {
    check_halves();
    for (const std::string& isa : valm::cpu_isas()) {
        check_searches(isa);
        check_several_searches(isa);
        check_int8_rows(isa);
        check_text_blocks(isa);
        for (const int64_t head_dim : {24, 64}) {
            check_image_attn(isa, head_dim, false);
            check_image_attn(isa, head_dim, true);
        }
    }
    std::printf("ok\n");
}
