#include "int8_rows/text_block.hpp"

#include <algorithm>
#include <vector>

#include "int8_rows/int8_rows.hpp"

namespace valm {

namespace {

// Fewer products of numbers are left to one thread.
constexpr int64_t kProductsPerThread = 32768;

struct Call {
    const std::string& isa;
    int threads;
    const Int8RowKernels& kernels;

    // out (count, outputs) of rows (count, width)
    void multiply(const float* rows, int64_t count, int64_t width, const Int8Layer& layer, int64_t outputs,
                  float* out) const {
        linear_rows(isa, threads, rows, count, width, layer.weight, outputs, layer.scale, layer.sum, layer.bias,
                    reinterpret_cast<int32_t*>(out));
    }
    void normalise(const float* rows, int64_t count, int64_t width, const Norm& norm, float* out) const {
        for (int64_t i = 0; i < count; ++i)
            kernels.normalise(rows + i * width, width, norm.weight, norm.bias, norm.eps, out + i * width);
    }
};

void add(const std::vector<float>& from, float* to) {
    for (size_t i = 0; i < from.size(); ++i) to[i] += from[i];
}

// out (streams - first_out, texts, width)
void attend(const Call& call, const TextBlock& block, const PastTokens& past, const float* projected, int64_t texts,
            int64_t streams, int64_t first_out, float* out) {
    const int64_t dim = block.width / block.heads, units = (streams - first_out) * texts * block.heads;
#pragma omp parallel for num_threads(call.threads) if (units * past.count * dim > kProductsPerThread)
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t head = unit % block.heads, text = unit / block.heads % texts;
        const int64_t stream = first_out + unit / block.heads / texts;
        const auto of_stream = [&](int64_t s, int64_t part) {
            return projected + ((s * texts + text) * 3 + part) * block.width + head * dim;
        };
        call.kernels.attend({of_stream(stream, 0),
                             past.keys + text * past.key_steps[0] + head * past.key_steps[1],
                             past.values + text * past.value_steps[0] + head * past.value_steps[1],
                             past.key_steps[2],
                             past.value_steps[2],
                             past.first == nullptr ? 0 : std::clamp<int64_t>(past.first[text], 0, past.count),
                             past.count,
                             {of_stream(0, 1), of_stream(streams - 1, 1)},
                             {of_stream(0, 2), of_stream(streams - 1, 2)},
                             stream + 1,
                             dim},
                            out + unit * dim);
    }
}

}  // namespace

void text_block_step(const std::string& isa, int threads, const TextBlock& block, const PastTokens& past, float* hidden,
                     int64_t texts, int64_t streams, int64_t first_out, float* projected) {
    const Call call{isa, threads, int8_row_kernels(isa)};
    const int64_t width = block.width, rows = streams * texts, rows_out = (streams - first_out) * texts;
    std::vector<float> normed(rows * width);
    call.normalise(hidden, rows, width, block.attention_norm, normed.data());
    call.multiply(normed.data(), rows, width, block.attention_in, 3 * width, projected);

    hidden += first_out * texts * width;
    std::vector<float> mixed(rows_out * width), added(rows_out * width), inner(rows_out * block.inner_width);
    attend(call, block, past, projected, texts, streams, first_out, mixed.data());
    call.multiply(mixed.data(), rows_out, width, block.attention_out, width, added.data());
    add(added, hidden);

    call.normalise(hidden, rows_out, width, block.mlp_norm, normed.data());
    call.multiply(normed.data(), rows_out, width, block.mlp_in, block.inner_width, inner.data());
    call.kernels.activate(inner.data(), inner.size(), block.activation);
    call.multiply(inner.data(), rows_out, block.inner_width, block.mlp_out, width, added.data());
    add(added, hidden);
}

}  // namespace valm
