// The kernels, compiled once per instruction set: each image_attn_*.cpp includes this file.
//
// Threads share out units of kTokensPerUnit neighbouring tokens of one batch row, with all their heads. Sums over
// tokens (the gradients of the biases) are kept per unit and added up in the order of the units, and a pool row's
// gradient is summed by one thread in the order of the tokens: so no result depends on the number of threads.
#pragma once

#include <algorithm>
#include <limits>

#include "image_attn/lanes.hpp"

namespace valm {
namespace {

constexpr int64_t kTokensPerUnit = 16;
constexpr int64_t kMaxImages = 64;
constexpr int64_t kMaxHeadDim = 256;

// One row of head_dim numbers in the precision of the sums, zeros behind them.
template <typename Wide>
struct alignas(64) Row {
    using Vector = typename Lanes<Wide>::Vector;
    static constexpr int64_t kLanes = Lanes<Wide>::count;
    Vector vectors[kMaxHeadDim / kLanes];

    template <typename T>
    void read(const T* from, int64_t dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] = load(from + d, dim - d);
    }

    template <typename T>
    void write(T* to, int64_t dim) const {
        for (int64_t d = 0; d < dim; d += kLanes) store(to + d, vectors[d / kLanes], dim - d);
    }

    void clear(int64_t dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] = Vector{};
    }

    template <typename T>
    Wide dot(const T* other, int64_t dim) const {
        Vector sum = {};
        for (int64_t d = 0; d < dim; d += kLanes) sum += vectors[d / kLanes] * load(other + d, dim - d);
        return sum_of(sum);
    }

    template <typename T>
    void add(Wide factor, const T* other, int64_t dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] += factor * load(other + d, dim - d);
    }

    void add(Wide factor, const Row& other, int64_t dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] += factor * other.vectors[d / kLanes];
    }

    void scale(Wide factor, int64_t dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] *= factor;
    }
};

// Calls f(b, i, kv_head, unit, scratch) for every token and key/value head; a unit stays with one thread. Within a
// unit tokens and heads are walked in the order in which their images lie in memory.
template <typename Scratch, typename T, typename Wide, typename Function>
void for_each_token(const Problem<T, Wide>& p, Function f) {
    const ImageAttnSizes& n = p.sizes;
    const int64_t units_per_row = (n.queries + kTokensPerUnit - 1) / kTokensPerUnit;
    const bool heads_inside = p.pooled() || p.image_k.strides[1] < p.image_k.strides[2];
#pragma omp parallel num_threads(p.threads)
    {
        Scratch scratch(n);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch * units_per_row; ++unit) {
            const int64_t b = unit / units_per_row;
            const int64_t start = unit % units_per_row * kTokensPerUnit;
            const int64_t stop = std::min(start + kTokensPerUnit, n.queries);
            if (heads_inside) {
                for (int64_t i = start; i < stop; ++i)
                    for (int64_t head = 0; head < n.kv_heads; ++head) f(b, i, head, unit, scratch);
            } else {
                for (int64_t head = 0; head < n.kv_heads; ++head)
                    for (int64_t i = start; i < stop; ++i) f(b, i, head, unit, scratch);
            }
        }
    }
}

// What one thread needs for one token and key/value head: a row or K weights for each query head of its group.
template <typename Wide>
struct ForwardScratch {
    explicit ForwardScratch(const ImageAttnSizes& n)
        : q(n.query_heads / n.kv_heads), out(q.size()), weights(q.size() * kMaxImages) {}
    Buffer<Row<Wide>> q, out;
    Buffer<Wide> weights;
};

template <typename T, typename Wide>
void forward(const Problem<T, Wide>& p) {
    const int64_t dim = p.sizes.head_dim, images = p.sizes.images;
    const int64_t group = p.sizes.query_heads / p.sizes.kv_heads;
    constexpr Wide kNone = -std::numeric_limits<Wide>::infinity();

    for_each_token<ForwardScratch<Wide>>(
        p, [&](int64_t b, int64_t i, int64_t kv_head, int64_t, ForwardScratch<Wide>& scratch) {
            const T* rows[kMaxImages];
            for (int64_t k = 0; k < images; ++k)
                rows[k] = p.has_image(b, i, k) ? p.image_row(p.image_k, b, kv_head, i, k) : nullptr;

            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = kv_head * group + g;
                Row<Wide>& q = scratch.q[g];
                q.read(p.q.at(b, head, i), dim);
                Wide offset = p.image_logit_bias ? *p.image_logit_bias.at(head) : 0;
                if (p.image_k_bias) offset += p.scale * q.dot(p.image_k_bias.at(kv_head), dim);

                Wide* weights = &scratch.weights[g * kMaxImages];
                Wide& lse = *p.lse.at(b, head, i);
                const Wide text_lse = lse;
                Wide highest = text_lse;
                for (int64_t k = 0; k < images; ++k) {
                    weights[k] = rows[k] ? p.scale * q.dot(rows[k], dim) + offset : kNone;
                    highest = std::max(highest, weights[k]);
                }
                Row<Wide>& out = scratch.out[g];
                out.clear(dim);
                if (highest == kNone) {  // sees nothing: lse stays -inf
                    std::fill_n(weights, images, Wide(0));
                    continue;
                }
                const Wide text = std::exp(text_lse - highest);
                Wide sum = text;
                for (int64_t k = 0; k < images; ++k) sum += weights[k] = std::exp(weights[k] - highest);
                lse = highest + std::log(sum);
                Wide of_images = 0;
                for (int64_t k = 0; k < images; ++k) of_images += weights[k] /= sum;
                if (text > 0) out.add(text / sum, p.out.at(b, head, i), dim);
                if (p.image_v_bias) out.add(of_images, p.image_v_bias.at(kv_head), dim);
            }
            for (int64_t k = 0; k < images; ++k) {
                if (!rows[k]) continue;
                const T* value = p.image_row(p.image_v, b, kv_head, i, k);
                for (int64_t g = 0; g < group; ++g) scratch.out[g].add(scratch.weights[g * kMaxImages + k], value, dim);
            }
            for (int64_t g = 0; g < group; ++g) scratch.out[g].write(p.out.at(b, kv_head * group + g, i), dim);
        });
}

template <typename Wide>
struct BackwardScratch {
    explicit BackwardScratch(const ImageAttnSizes& n)
        : q(n.query_heads / n.kv_heads), grad_out(q.size()), grad_q(q.size()), heads(q.size()) {}
    struct Head {
        Wide score_offset, grad_weight_offset, lse, delta, sum_of_weights, sum_of_grad_scores;
    };
    Buffer<Row<Wide>> q, grad_out, grad_q;
    Buffer<Head> heads;
    Row<Wide> grad_key, grad_value;
};

// The bias gradients, unit by unit: rows of head_dim numbers for keys and values, one number for the logits.
template <typename Wide>
struct BiasGradients {
    BiasGradients(const ImageAttnSizes& n, int64_t units)
        : sizes(n),
          units(units),
          keys(units * n.kv_heads * n.head_dim),
          values(keys.size()),
          logits(units * n.query_heads) {}

    Wide* row(Buffer<Wide>& rows, int64_t unit, int64_t kv_head) {
        return &rows[(unit * sizes.kv_heads + kv_head) * sizes.head_dim];
    }

    void add(Buffer<Wide>& rows, int64_t unit, int64_t kv_head, Wide factor, const Row<Wide>& other) {
        Wide* memory = row(rows, unit, kv_head);
        Row<Wide> sum;
        sum.read(memory, sizes.head_dim);
        sum.add(factor, other, sizes.head_dim);
        sum.write(memory, sizes.head_dim);
    }

    void write_sum(Buffer<Wide>& rows, const View<Wide>& gradient) {
        for (int64_t kv_head = 0; kv_head < sizes.kv_heads && gradient; ++kv_head) {
            Row<Wide> sum;
            sum.clear(sizes.head_dim);
            for (int64_t unit = 0; unit < units; ++unit) sum.add(1, row(rows, unit, kv_head), sizes.head_dim);
            sum.write(gradient.at(kv_head), sizes.head_dim);
        }
    }

    void write_logit_sum(const View<Wide>& gradient) {
        for (int64_t head = 0; head < sizes.query_heads && gradient; ++head) {
            Wide sum = 0;
            for (int64_t unit = 0; unit < units; ++unit) sum += logits[unit * sizes.query_heads + head];
            *gradient.at(head) = sum;
        }
    }

    const ImageAttnSizes& sizes;
    int64_t units;
    Buffer<Wide> keys, values, logits;
};

// The slots (b * queries + i) * images + k that hold each row of the pool, ascending: those of row u are
// slots[first[u]] ... slots[first[u + 1] - 1].
struct PoolSlots {
    Buffer<int64_t> first, slots;

    template <typename T, typename Wide>
    explicit PoolSlots(const Problem<T, Wide>& p)
        : first(p.sizes.pool_rows + 1), slots(p.sizes.batch * p.sizes.queries * p.sizes.images) {
        const ImageAttnSizes& n = p.sizes;
        const auto for_each_slot = [&](auto f) {
            int64_t slot = 0;
            for (int64_t b = 0; b < n.batch; ++b)
                for (int64_t i = 0; i < n.queries; ++i)
                    for (int64_t k = 0; k < n.images; ++k, ++slot)
                        if (const int64_t row = *p.image_index.at(b, i, k); row >= 0) f(row, slot);
        };
        for_each_slot([&](int64_t row, int64_t) { ++first[row + 1]; });
        for (int64_t row = 0; row < n.pool_rows; ++row) first[row + 1] += first[row];
        Buffer<int64_t> next(n.pool_rows);
        std::copy_n(&first[0], n.pool_rows, &next[0]);
        for_each_slot([&](int64_t row, int64_t slot) { slots[next[row]++] = slot; });
    }
};

// The pool's gradients as a segmented reduction, from the weights and score gradients of all slots
// (B, T, Hq, K): grad_k = scale * sum grad_score * q, grad_v = sum weight * grad_out over the slots of a row.
template <typename T, typename Wide>
void write_pool_gradients(const Problem<T, Wide>& p, const Buffer<Wide>& weights, const Buffer<Wide>& grad_scores) {
    const ImageAttnSizes& n = p.sizes;
    const int64_t group = n.query_heads / n.kv_heads;
    const PoolSlots pool(p);
#pragma omp parallel for collapse(2) schedule(dynamic, 16) num_threads(p.threads)
    for (int64_t row = 0; row < n.pool_rows; ++row) {
        for (int64_t kv_head = 0; kv_head < n.kv_heads; ++kv_head) {
            Row<Wide> grad_key, grad_value;
            grad_key.clear(n.head_dim);
            grad_value.clear(n.head_dim);
            for (int64_t at = pool.first[row]; at < pool.first[row + 1]; ++at) {
                const int64_t token = pool.slots[at] / n.images, k = pool.slots[at] % n.images;
                const int64_t b = token / n.queries, i = token % n.queries;
                for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                    const int64_t entry = (token * n.query_heads + head) * n.images + k;
                    grad_key.add(p.scale * grad_scores[entry], p.q.at(b, head, i), n.head_dim);
                    grad_value.add(weights[entry], p.grad_out.at(b, head, i), n.head_dim);
                }
            }
            grad_key.write(p.grad_image_k.at(kv_head, row), n.head_dim);
            grad_value.write(p.grad_image_v.at(kv_head, row), n.head_dim);
        }
    }
}

template <typename T, typename Wide>
void backward(const Problem<T, Wide>& p) {
    const ImageAttnSizes& n = p.sizes;
    const int64_t dim = n.head_dim, images = n.images, group = n.query_heads / n.kv_heads;
    const bool bias_gradients = p.grad_image_k_bias || p.grad_image_v_bias || p.grad_image_logit_bias;
    const int64_t units = n.batch * ((n.queries + kTokensPerUnit - 1) / kTokensPerUnit);
    BiasGradients<Wide> bias(n, bias_gradients ? units : 0);
    const int64_t entries = p.pooled() ? n.batch * n.queries * n.query_heads * images : 0;
    Buffer<Wide> all_weights(entries), all_grad_scores(entries);

    using Scratch = BackwardScratch<Wide>;
    for_each_token<Scratch>(p, [&](int64_t b, int64_t i, int64_t kv_head, int64_t unit, Scratch& scratch) {
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = kv_head * group + g;
            Row<Wide>&q = scratch.q[g], &grad_out = scratch.grad_out[g];
            q.read(p.q.at(b, head, i), dim);
            grad_out.read(p.grad_out.at(b, head, i), dim);
            scratch.grad_q[g].read(p.grad_q.at(b, head, i), dim);
            auto& of_head = scratch.heads[g];
            of_head = {};
            of_head.lse = *p.lse.at(b, head, i);
            of_head.delta = grad_out.dot(p.out.at(b, head, i), dim);
            if (p.grad_lse) of_head.delta -= *p.grad_lse.at(b, head, i);
            if (p.image_logit_bias) of_head.score_offset = *p.image_logit_bias.at(head);
            if (p.image_k_bias) of_head.score_offset += p.scale * q.dot(p.image_k_bias.at(kv_head), dim);
            if (p.image_v_bias) of_head.grad_weight_offset = grad_out.dot(p.image_v_bias.at(kv_head), dim);
        }
        for (int64_t k = 0; k < images; ++k) {
            Row<Wide>&grad_key = scratch.grad_key, &grad_value = scratch.grad_value;
            if (!p.pooled()) {
                grad_key.clear(dim);
                grad_value.clear(dim);
            }
            if (p.has_image(b, i, k)) {
                const T* key = p.image_row(p.image_k, b, kv_head, i, k);
                const T* value = p.image_row(p.image_v, b, kv_head, i, k);
                for (int64_t g = 0; g < group; ++g) {
                    auto& of_head = scratch.heads[g];
                    const Wide score = p.scale * scratch.q[g].dot(key, dim) + of_head.score_offset;
                    const Wide weight = std::exp(score - of_head.lse);
                    const Wide grad_weight = scratch.grad_out[g].dot(value, dim) + of_head.grad_weight_offset;
                    const Wide grad_score = weight * (grad_weight - of_head.delta);
                    of_head.sum_of_weights += weight;
                    of_head.sum_of_grad_scores += grad_score;
                    scratch.grad_q[g].add(p.scale * grad_score, key, dim);
                    if (p.pooled()) {
                        const int64_t head = kv_head * group + g;
                        const int64_t entry = ((b * n.queries + i) * n.query_heads + head) * images + k;
                        all_weights[entry] = weight;
                        all_grad_scores[entry] = grad_score;
                    } else {
                        grad_key.add(p.scale * grad_score, scratch.q[g], dim);
                        grad_value.add(weight, scratch.grad_out[g], dim);
                    }
                }
            }
            if (!p.pooled()) {
                grad_key.write(p.grad_image_k.at(b, kv_head, i, k), dim);
                grad_value.write(p.grad_image_v.at(b, kv_head, i, k), dim);
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = kv_head * group + g;
            const auto& of_head = scratch.heads[g];
            const Wide of_key = p.scale * of_head.sum_of_grad_scores;
            if (p.image_k_bias) scratch.grad_q[g].add(of_key, p.image_k_bias.at(kv_head), dim);
            scratch.grad_q[g].write(p.grad_q.at(b, head, i), dim);
            if (!bias_gradients) continue;
            bias.logits[unit * n.query_heads + head] += of_head.sum_of_grad_scores;
            bias.add(bias.keys, unit, kv_head, of_key, scratch.q[g]);
            bias.add(bias.values, unit, kv_head, of_head.sum_of_weights, scratch.grad_out[g]);
        }
    });
    if (p.pooled()) write_pool_gradients(p, all_weights, all_grad_scores);
    bias.write_sum(bias.keys, p.grad_image_k_bias);
    bias.write_sum(bias.values, p.grad_image_v_bias);
    bias.write_logit_sum(p.grad_image_logit_bias);
}

constexpr ImageAttnKernels kKernels = {
    forward<float, float>,  forward<BFloat16, float>,  forward<Float16, float>,  forward<double, double>,
    backward<float, float>, backward<BFloat16, float>, backward<Float16, float>, backward<double, double>,
};

}  // namespace
}  // namespace valm
