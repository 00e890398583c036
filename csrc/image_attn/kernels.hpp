// The kernels, compiled once per instruction set: each kernels_*.cpp includes this file.
//
// Threads share out units of kTokensPerUnit neighbouring tokens of one batch row, with all their heads. No result
// depends on the number of threads: sums over tokens (the gradients of the biases) are kept per unit and added up in
// the order of the units, and one thread sums a pool row's gradient in the order of the tokens.
#pragma once

#include <algorithm>
#include <limits>

#include "image_attn/problem.hpp"
#include "simd/lanes.hpp"

namespace valm {
namespace {

constexpr int64_t kTokensPerUnit = 16;
// A pool row's slots are summed in parts, whose sums are then added up: a popular image fills thousands of slots, and
// one sum over all of them would add a rounding error for each.
constexpr int64_t kSlotsPerPart = 16;
// delta = sum(grad_out * out) inherits the rounding of out. If the text's weight is below this, far less than 16 bits
// round, the images' score gradients must sum to the gradient of lse, and are corrected to do so.
constexpr float kNoText = 0x1p-13f;
constexpr int64_t kMaxImages = 64;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kCacheLine = 64;
// Dense image gradients of at least this size are written around the caches.
constexpr int64_t kAroundCachesBytes = int64_t{8} << 20;

// head_dim, known when compiling unless kValue is 0.
template <int64_t kValue>
struct HeadDim {
    int64_t value;
    operator int64_t() const { return kValue ? kValue : value; }
};

// One row of head_dim numbers in the precision of the sums, padded with zeros.
template <typename Wide>
struct alignas(64) Row {
    using Vector = typename Lanes<Wide>::Vector;
    static constexpr int64_t kLanes = Lanes<Wide>::count;
    Vector vectors[kMaxHeadDim / kLanes];

    template <typename T, typename Dim>
    void read(const T* from, Dim dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] = load(from + d, dim - d);
    }

    template <typename T, typename Dim>
    void write(T* to, Dim dim) const {
        for (int64_t d = 0; d < dim; d += kLanes) store(to + d, vectors[d / kLanes], dim - d);
    }

    template <typename Dim>
    void clear(Dim dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] = Vector{};
    }

    template <typename T, typename Dim>
    Wide dot(const T* other, Dim dim) const {
        Vector sum = {};
        for (int64_t d = 0; d < dim; d += kLanes) sum += vectors[d / kLanes] * load(other + d, dim - d);
        return sum_of(sum);
    }

    template <typename T, typename Dim>
    void add(Wide factor, const T* other, Dim dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] += factor * load(other + d, dim - d);
    }

    template <typename Dim>
    void add(Wide factor, const Row& other, Dim dim) {
        for (int64_t d = 0; d < dim; d += kLanes) vectors[d / kLanes] += factor * other.vectors[d / kLanes];
    }
};

// K + 1 numbers of one head, padded to whole vectors.
template <typename Wide>
struct alignas(64) Scores {
    using Vector = typename Lanes<Wide>::Vector;
    static constexpr int64_t kLanes = Lanes<Wide>::count;
    Vector vectors[kMaxImages / kLanes + 1];

    Wide& operator[](int64_t k) { return reinterpret_cast<Wide*>(vectors)[k]; }
    Wide operator[](int64_t k) const { return reinterpret_cast<const Wide*>(vectors)[k]; }
    Vector& vector_at(int64_t k) { return vectors[k / kLanes]; }
    void fill(Wide value, int64_t n) {
        for (int64_t k = 0; k < n; k += kLanes) vectors[k / kLanes] = Vector{} + value;
    }
};

// The keys and values of one token and head; nullptr if a slot holds no image.
template <typename T>
struct TokenImages {
    const T *keys[kMaxImages], *values[kMaxImages];

    template <typename Wide>
    void find_and_prefetch(const Problem<T, Wide>& p, int64_t b, int64_t i, int64_t kv_head) {
        for (int64_t k = 0; k < p.sizes.images; ++k) {
            keys[k] = values[k] = nullptr;
            if (!p.has_image(b, kv_head, i, k)) continue;
            keys[k] = p.image_row(p.image_k, b, kv_head, i, k);
            values[k] = p.image_row(p.image_v, b, kv_head, i, k);
            for (int64_t d = 0; d < p.sizes.head_dim; d += kCacheLine / sizeof(T)) {
                __builtin_prefetch(keys[k] + d);
                __builtin_prefetch(values[k] + d);
            }
        }
    }
};

// Calls f(b, i, kv_head, unit, images, scratch) for every token and key/value head; a unit stays with one thread.
// Within a unit, tokens and heads come in the order of their images in memory, and the images of the next call are
// prefetched while this one computes.
template <typename Scratch, typename T, typename Wide, typename Function>
void for_each_token(const Problem<T, Wide>& p, Function f) {
    const ImageAttnSizes& n = p.sizes;
    const int64_t units_per_row = (n.queries + kTokensPerUnit - 1) / kTokensPerUnit;
    const bool heads_inside = p.pooled() || p.image_k.strides[1] < p.image_k.strides[2];
#pragma omp parallel num_threads(p.threads)
    {
        Scratch scratch(n);
        TokenImages<T> images[2];
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < n.batch * units_per_row; ++unit) {
            const int64_t b = unit / units_per_row;
            const int64_t start = unit % units_per_row * kTokensPerUnit;
            const int64_t tokens = std::min(kTokensPerUnit, n.queries - start);
            const auto token = [&](int64_t call) { return start + (heads_inside ? call / n.kv_heads : call % tokens); };
            const auto head = [&](int64_t call) { return heads_inside ? call % n.kv_heads : call / tokens; };
            images[0].find_and_prefetch(p, b, token(0), head(0));
            for (int64_t call = 0; call < tokens * n.kv_heads; ++call) {
                if (call + 1 < tokens * n.kv_heads)
                    images[(call + 1) % 2].find_and_prefetch(p, b, token(call + 1), head(call + 1));
                f(b, token(call), head(call), unit, images[call % 2], scratch);
            }
        }
        finish_stores_around_caches();
    }
}

// A score under the cap, and its derivative, 1 - tanh².
template <typename Wide>
struct Capped {
    Capped(Wide score, Wide softcap) : value(score), slope(1) {
        if (softcap == 0) return;
        const Wide tanh = std::tanh(score / softcap);
        value = softcap * tanh;
        slope = 1 - tanh * tanh;
    }
    Wide value, slope;
};

// Adds image_score_bias to the scores of images that are present.
template <typename T, typename Wide>
void add_score_bias(const Problem<T, Wide>& p, int64_t b, int64_t i, const TokenImages<T>& rows, Scores<Wide>& scores) {
    if (!p.image_score_bias) return;
    const Wide* bias = p.image_score_bias.at(b, i);
    for (int64_t k = 0; k < p.sizes.images; ++k)
        if (rows.keys[k]) scores[k] += bias[k];
}

// One thread's buffers for one token and head.
template <typename Wide>
struct ForwardScratch {
    explicit ForwardScratch(const ImageAttnSizes&) {}
    Row<Wide> q, out;
    Scores<Wide> weights;
};

template <int64_t kHeadDim, typename T, typename Wide>
void forward(const Problem<T, Wide>& p) {
    const HeadDim<kHeadDim> dim{p.sizes.head_dim};
    const int64_t images = p.sizes.images;
    const int64_t group = p.sizes.query_heads / p.sizes.kv_heads;
    constexpr Wide kNone = -std::numeric_limits<Wide>::infinity();
    using Scratch = ForwardScratch<Wide>;

    for_each_token<Scratch>(
        p, [&](int64_t b, int64_t i, int64_t kv_head, int64_t, const TokenImages<T>& rows, Scratch& scratch) {
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                auto& [q, out, weights] = scratch;
                q.read(p.q.at(b, head, i), dim);
                const Wide logit = p.image_logit_bias ? *p.image_logit_bias.at(head) : 0;
                const Wide offset = p.image_k_bias ? p.scale * q.dot(p.image_k_bias.at(kv_head), dim) : 0;

                // scores, then weights, of the images and, at the end, of the text
                weights.fill(kNone, images + 1);
                for (int64_t k = 0; k < images; ++k)
                    if (rows.keys[k])
                        weights[k] = Capped(p.scale * q.dot(rows.keys[k], dim) + offset, p.softcap).value + logit;
                add_score_bias(p, b, i, rows, weights);
                if (p.image_scores)
                    for (int64_t k = 0; k < images; ++k) p.image_scores.at(b, head, i)[k] = weights[k];
                Wide& lse = *p.lse.at(b, head, i);
                weights[images] = lse;
                Wide highest = kNone;
                for (int64_t k = 0; k <= images; ++k)  // NaN is the highest: out and lse become NaN, as they should
                    if (weights[k] > highest || std::isnan(weights[k])) highest = weights[k];

                out.clear(dim);
                if (highest != kNone) {  // otherwise the query sees nothing: lse stays -inf, and out becomes 0
                    typename Lanes<Wide>::Vector sums = {};
                    for (int64_t k = 0; k <= images; k += Scores<Wide>::kLanes)
                        sums += weights.vector_at(k) = exp_of(weights.vector_at(k) - highest);
                    const Wide sum = sum_of(sums);
                    lse = highest + std::log(sum);
                    for (int64_t k = 0; k <= images; k += Scores<Wide>::kLanes) weights.vector_at(k) /= sum;
                    if (weights[images] != 0) out.add(weights[images], p.out.at(b, head, i), dim);
                    if (p.image_v_bias) out.add(1 - weights[images], p.image_v_bias.at(kv_head), dim);
                    for (int64_t k = 0; k < images; ++k)
                        if (rows.values[k]) out.add(weights[k], rows.values[k], dim);
                }
                out.write(p.out.at(b, head, i), dim);
            }
        });
}

template <typename Wide>
struct BackwardScratch {
    explicit BackwardScratch(const ImageAttnSizes& n) : heads(n.query_heads / n.kv_heads) {}
    struct Head {
        Row<Wide> q, grad_out;
        Scores<Wide> weights, grad_scores;
    };
    Row<Wide> grad_q;
    Scores<Wide> slopes;  // d score / d (scale q.k)
    Buffer<Head> heads;
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

// The slots (b * queries + i) * images + k of a head that hold each row of the pool, ascending: row u is in
// slots[first[u]] ... slots[first[u + 1] - 1].
struct PoolSlots {
    Buffer<int64_t> first, slots;

    template <typename T, typename Wide>
    PoolSlots(const Problem<T, Wide>& p, int64_t kv_head)
        : first(p.sizes.pool_rows + 1), slots(p.sizes.batch * p.sizes.queries * p.sizes.images) {
        const ImageAttnSizes& n = p.sizes;
        const auto for_each_slot = [&](auto f) {
            int64_t slot = 0;
            for (int64_t b = 0; b < n.batch; ++b)
                for (int64_t i = 0; i < n.queries; ++i)
                    for (int64_t k = 0; k < n.images; ++k, ++slot)
                        if (const int64_t row = *p.image_index.at(b, kv_head, i, k); row >= 0) f(row, slot);
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
template <int64_t kHeadDim, typename T, typename Wide>
void write_pool_gradients(const Problem<T, Wide>& p, const Buffer<Wide>& weights, const Buffer<Wide>& grad_scores) {
    const ImageAttnSizes& n = p.sizes;
    const HeadDim<kHeadDim> dim{n.head_dim};
    const int64_t group = n.query_heads / n.kv_heads;
    // Writes the gradients of a row of the pool and a head.
    const auto write = [&](const PoolSlots& pool, int64_t row, int64_t kv_head) {
        Row<Wide> grad_key, grad_value, key_part, value_part;
        grad_key.clear(dim);
        grad_value.clear(dim);
        const int64_t last = pool.first[row + 1];
        for (int64_t start = pool.first[row]; start < last; start += kSlotsPerPart) {
            key_part.clear(dim);
            value_part.clear(dim);
            for (int64_t at = start; at < std::min(start + kSlotsPerPart, last); ++at) {
                const int64_t token = pool.slots[at] / n.images, k = pool.slots[at] % n.images;
                const int64_t b = token / n.queries, i = token % n.queries;
                for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                    const int64_t entry = (token * n.query_heads + head) * n.images + k;
                    key_part.add(p.scale * grad_scores[entry], p.q.at(b, head, i), dim);
                    value_part.add(weights[entry], p.grad_out.at(b, head, i), dim);
                }
            }
            grad_key.add(1, key_part, dim);
            grad_value.add(1, value_part, dim);
        }
        grad_key.write(p.grad_image_k.at(kv_head, row), dim);
        grad_value.write(p.grad_image_v.at(kv_head, row), dim);
    };
    const int64_t heads_of_slots = p.by_head() ? 1 : n.kv_heads;
    for (int64_t first = 0; first < n.kv_heads; first += heads_of_slots) {
        const PoolSlots pool(p, first);
#pragma omp parallel for collapse(2) schedule(dynamic, 16) num_threads(p.threads)
        for (int64_t row = 0; row < n.pool_rows; ++row)
            for (int64_t kv_head = first; kv_head < first + heads_of_slots; ++kv_head) write(pool, row, kv_head);
    }
}

template <int64_t kHeadDim, typename T, typename Wide>
void backward(const Problem<T, Wide>& p) {
    const ImageAttnSizes& n = p.sizes;
    const HeadDim<kHeadDim> dim{n.head_dim};
    const int64_t images = n.images, group = n.query_heads / n.kv_heads;
    const bool bias_gradients = p.grad_image_k_bias || p.grad_image_v_bias || p.grad_image_logit_bias;
    const int64_t units = n.batch * ((n.queries + kTokensPerUnit - 1) / kTokensPerUnit);
    BiasGradients<Wide> bias(n, bias_gradients ? units : 0);
    const bool pool_gradients = p.pooled() && p.grad_image_k;
    const int64_t entries = pool_gradients ? n.batch * n.queries * n.query_heads * images : 0;
    Buffer<Wide> all_weights(entries), all_grad_scores(entries);
    constexpr Wide kNone = -std::numeric_limits<Wide>::infinity();
    constexpr int64_t kLanes = Lanes<Wide>::count;
    const bool around_caches = n.batch * n.queries * images * n.kv_heads * dim * sizeof(T) >= kAroundCachesBytes &&
                               dim % kLanes == 0 && p.grad_image_k.aligned(kVectorBytes) &&
                               p.grad_image_v.aligned(kVectorBytes);

    using Scratch = BackwardScratch<Wide>;
    for_each_token<Scratch>(
        p, [&](int64_t b, int64_t i, int64_t kv_head, int64_t unit, const TokenImages<T>& rows, Scratch& scratch) {
            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = kv_head * group + g;
                auto& [q, grad_out, weights, grad_scores] = scratch.heads[g];
                q.read(p.q.at(b, head, i), dim);
                grad_out.read(p.grad_out.at(b, head, i), dim);
                Wide delta = grad_out.dot(p.out.at(b, head, i), dim);
                if (p.grad_lse) delta -= *p.grad_lse.at(b, head, i);
                Wide logit = p.image_logit_bias ? *p.image_logit_bias.at(head) : 0;
                const Wide offset = p.image_k_bias ? p.scale * q.dot(p.image_k_bias.at(kv_head), dim) : 0;
                if (p.image_v_bias) delta -= grad_out.dot(p.image_v_bias.at(kv_head), dim);
                logit -= *p.lse.at(b, head, i);

                weights.fill(kNone, images);
                grad_scores.fill(0, images);
                Scores<Wide>& slopes = scratch.slopes;
                slopes.fill(0, images);
                for (int64_t k = 0; k < images; ++k) {
                    if (!rows.keys[k]) continue;
                    const Capped score(p.scale * q.dot(rows.keys[k], dim) + offset, p.softcap);
                    weights[k] = score.value + logit;
                    grad_scores[k] = grad_out.dot(rows.values[k], dim) - delta;
                    slopes[k] = score.slope;
                }
                add_score_bias(p, b, i, rows, weights);
                typename Lanes<Wide>::Vector weight_sums = {}, grad_score_sums = {};
                for (int64_t k = 0; k < images; k += kLanes) {
                    auto &weight = weights.vector_at(k), &grad_score = grad_scores.vector_at(k);
                    weight_sums += weight = exp_of(weight);
                    grad_score_sums += grad_score *= weight;
                }

                const Wide weight_sum = sum_of(weight_sums);
                Wide grad_logit = sum_of(grad_score_sums);
                if (sizeof(T) == 2 && 1 - weight_sum < kNoText) {
                    const Wide error = grad_logit - (p.grad_lse ? *p.grad_lse.at(b, head, i) : 0);
                    for (int64_t k = 0; k < images; k += kLanes)
                        grad_scores.vector_at(k) -= error * weights.vector_at(k);
                    grad_logit -= error;
                }
                if (p.grad_image_scores) {
                    const Wide* grad_image_scores = p.grad_image_scores.at(b, head, i);
                    for (int64_t k = 0; k < images; ++k) {
                        if (!rows.keys[k]) continue;
                        grad_scores[k] += grad_image_scores[k];
                        grad_logit += grad_image_scores[k];
                    }
                }
                if (p.grad_image_score_bias) {  // all heads of a token stay with one thread
                    Wide* grad_score_bias = p.grad_image_score_bias.at(b, i);
                    for (int64_t k = 0; k < images; ++k) grad_score_bias[k] += grad_scores[k];
                }
                // grad_scores are gradients of the scores so far, and of the products from here on
                Wide grad_score_sum = grad_logit;
                if (p.softcap != 0) {
                    typename Lanes<Wide>::Vector sums = {};
                    for (int64_t k = 0; k < images; k += kLanes)
                        sums += grad_scores.vector_at(k) *= slopes.vector_at(k);
                    grad_score_sum = sum_of(sums);
                }
                Row<Wide>& grad_q = scratch.grad_q;
                grad_q.read(p.grad_q.at(b, head, i), dim);
                for (int64_t k = 0; k < images; ++k)
                    if (rows.keys[k]) grad_q.add(p.scale * grad_scores[k], rows.keys[k], dim);
                if (p.image_k_bias) grad_q.add(p.scale * grad_score_sum, p.image_k_bias.at(kv_head), dim);
                grad_q.write(p.grad_q.at(b, head, i), dim);

                if (pool_gradients) {
                    const int64_t first = ((b * n.queries + i) * n.query_heads + head) * images;
                    for (int64_t k = 0; k < images; ++k) {
                        all_weights[first + k] = weights[k];
                        all_grad_scores[first + k] = grad_scores[k];
                    }
                }
                if (bias_gradients) {
                    bias.logits[unit * n.query_heads + head] += grad_logit;
                    bias.add(bias.keys, unit, kv_head, p.scale * grad_score_sum, q);
                    bias.add(bias.values, unit, kv_head, weight_sum, grad_out);
                }
            }
            if (p.pooled() || !p.grad_image_k) return;
            for (int64_t k = 0; k < images; ++k) {  // an absent image has weight and score gradient 0
                T* key = p.grad_image_k.at(b, kv_head, i, k);
                T* value = p.grad_image_v.at(b, kv_head, i, k);
                for (int64_t d = 0; d < dim; d += kLanes) {
                    typename Lanes<Wide>::Vector grad_key = {}, grad_value = {};
                    for (int64_t g = 0; g < group; ++g) {
                        const auto& of_head = scratch.heads[g];
                        grad_key += p.scale * of_head.grad_scores[k] * of_head.q.vectors[d / kLanes];
                        grad_value += of_head.weights[k] * of_head.grad_out.vectors[d / kLanes];
                    }
                    if (around_caches) {
                        store_around_caches(key + d, grad_key);
                        store_around_caches(value + d, grad_value);
                    } else {
                        store(key + d, grad_key, dim - d);
                        store(value + d, grad_value, dim - d);
                    }
                }
            }
        });
    if (pool_gradients) write_pool_gradients<kHeadDim>(p, all_weights, all_grad_scores);
    bias.write_sum(bias.keys, p.grad_image_k_bias);
    bias.write_sum(bias.values, p.grad_image_v_bias);
    bias.write_logit_sum(p.grad_image_logit_bias);
}

// A head_dim of 64, as in most language models, gets its own kernels, with unrolled loops.
template <typename T, typename Wide>
void any_forward(const Problem<T, Wide>& p) {
    p.sizes.head_dim == 64 ? forward<64>(p) : forward<0>(p);
}

template <typename T, typename Wide>
void any_backward(const Problem<T, Wide>& p) {
    p.sizes.head_dim == 64 ? backward<64>(p) : backward<0>(p);
}

constexpr ImageAttnKernels kernels_named(const char* isa) {
    return {
        isa,
        any_forward<float, float>,
        any_forward<BFloat16, float>,
        any_forward<Float16, float>,
        any_forward<double, double>,
        any_backward<float, float>,
        any_backward<BFloat16, float>,
        any_backward<Float16, float>,
        any_backward<double, double>,
    };
}

}  // namespace
}  // namespace valm
