#include "text_tower/text_blocks.hpp"

#include <algorithm>
#include <vector>

#include "text_tower/int8_rows.hpp"

namespace valm {

namespace {

// One thread handles fewer numbers, or fewer products.
constexpr int64_t kNumbersPerThread = 32768;
// Outputs of a float32 layer that a thread computes at once: their weights stay in its cache.
constexpr int64_t kOutputsAtOnce = 16;

struct Call {
    const std::string& isa;
    int threads;
    const TextTowerKernels& kernels;

    // out (count, outputs) of rows (count, width)
    void multiply(const float* rows, int64_t count, int64_t width, const Layer& layer, int64_t outputs,
                  float* out) const {
        if (layer.is_int8()) {
            linear_rows(isa, threads, rows, count, width, static_cast<const int8_t*>(layer.weight), outputs,
                        layer.scale, layer.sum, layer.bias, reinterpret_cast<int32_t*>(out));
            return;
        }
        const float* weight = static_cast<const float*>(layer.weight);
#pragma omp parallel for num_threads(threads) if (width * outputs > kNumbersPerThread)
        for (int64_t first = 0; first < outputs; first += kOutputsAtOnce)
            kernels.multiply_floats(rows, count, width, weight, layer.bias, first,
                                    std::min(first + kOutputsAtOnce, outputs), outputs, out);
    }
    // function(i) for each of `count` rows
    template <class Function>
    void each_row(int64_t count, int64_t width, const Function& function) const {
#pragma omp parallel for num_threads(threads) if (count * width > kNumbersPerThread)
        for (int64_t i = 0; i < count; ++i) function(i);
    }
    void normalise(const float* rows, int64_t count, int64_t width, const Norm& norm, float* out) const {
        each_row(count, width, [&](int64_t i) {
            kernels.normalise(rows + i * width, width, norm.weight, norm.bias, norm.eps, out + i * width);
        });
    }
    void activate(float* rows, int64_t count, int64_t width, Activation activation) const {
        each_row(count, width, [&](int64_t i) { kernels.activate(rows + i * width, width, activation); });
    }
    void add(const float* from, int64_t count, int64_t width, float* to) const {
        each_row(count, width, [&](int64_t i) {
            for (int64_t e = i * width; e < (i + 1) * width; ++e) to[e] += from[e];
        });
    }
};

// What a new token or an EOT sees besides the past: the new tokens `begin` to `end`, and an EOT also itself.
struct Row {
    int64_t text, begin, end;
    bool is_eot;
};

std::vector<Row> rows_of(const NewTokens& tokens) {
    std::vector<Row> rows;
    for (size_t text = 0; text < tokens.lengths.size(); ++text) {
        const int64_t begin = rows.size();
        for (int64_t i = 0; i < tokens.lengths[text]; ++i)
            rows.push_back({static_cast<int64_t>(text), begin, begin + i + 1, false});
    }
    for (const int64_t token : tokens.eot_after) {
        rows.push_back(rows[token]);
        rows.back().is_eot = true;
    }
    return rows;
}

// out (rows - first_out, width); `keys` and `values` are the past of this block.
void attend(const Call& call, const TextBlock& block, const PastTokens& past, const float* keys, const float* values,
            const std::vector<Row>& rows, const float* projected, int64_t first_out, float* out) {
    const int64_t dim = block.width / block.heads, row_step = 3 * block.width;
    const int64_t units = (static_cast<int64_t>(rows.size()) - first_out) * block.heads;
#pragma omp parallel for num_threads(call.threads) if (units * (past.count + 1) * dim > kNumbersPerThread)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t head = unit % block.heads, number = first_out + unit / block.heads;
        const Row& row = rows[number];
        const auto new_tokens = [&](int64_t begin, int64_t count) {
            const float* new_keys = projected + begin * row_step + block.width + head * dim;
            return TokenSpan{new_keys, new_keys + block.width, row_step, count};
        };
        const int64_t first = past.first.empty() ? 0 : std::clamp<int64_t>(past.first[row.text], 0, past.count);
        const int64_t before = row.text * past.steps[2] + head * past.steps[3] + first * past.steps[4];
        call.kernels.attend({projected + number * row_step + head * dim,
                             {{keys + before, values + before, past.steps[4], past.count - first},
                              new_tokens(row.begin, row.end - row.begin),
                              new_tokens(number, row.is_eot)},
                             dim},
                            out + unit * dim);
    }
}

}  // namespace

void text_blocks_step(const std::string& isa, int threads, const std::vector<TextBlock>& blocks, PastTokens past,
                      const NewTokens& tokens, float* hidden, float* projected) {
    if (past.count == 0) past.steps = {};  // there is no address to count from
    const Call call{isa, threads, text_tower_kernels(isa)};
    const std::vector<Row> rows = rows_of(tokens);
    const int64_t count = rows.size(), eots = tokens.eot_after.size();
    const float* keys = past.data;
    std::vector<float> normed, mixed, added, inner;
    for (const TextBlock& block : blocks) {
        const int64_t width = block.width, first_out = eots > 0 && &block == &blocks.back() ? count - eots : 0;
        const int64_t count_out = count - first_out;
        normed.resize(count * width);
        call.normalise(hidden, count, width, block.attention_norm, normed.data());
        call.multiply(normed.data(), count, width, block.attention_in, 3 * width, projected);

        float* out = hidden + first_out * width;
        mixed.resize(count_out * width);
        attend(call, block, past, keys, keys + past.steps[1], rows, projected, first_out, mixed.data());
        added.resize(count_out * width);
        call.multiply(mixed.data(), count_out, width, block.attention_out, width, added.data());
        call.add(added.data(), count_out, width, out);

        call.normalise(out, count_out, width, block.mlp_norm, normed.data());
        inner.resize(count_out * block.inner_width);
        call.multiply(normed.data(), count_out, width, block.mlp_in, block.inner_width, inner.data());
        call.activate(inner.data(), count_out, block.inner_width, block.activation);
        call.multiply(inner.data(), count_out, block.inner_width, block.mlp_out, width, added.data());
        call.add(added.data(), count_out, width, out);

        keys += past.steps[0];
        projected += count * 3 * width;
    }
}

}  // namespace valm
