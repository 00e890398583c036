// The row kernels, written once over a vector type V and included by the file of each instruction set. All of it
// has internal linkage: the linker must never hand code of one instruction set to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "topk/exact.hpp"
#include "topk/cpu/first_pass.hpp"

namespace valm {
namespace {

constexpr int64_t kMaxDim = 2048;

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    // the exponent's bias is corrected by a product, which also normalises what is denormal
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = magnitude < 0x0f800000u ? bits : magnitude | 0x7f800000u;  // infinity and NaN
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bfloat_to_float(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// One row, read as float32: by the vector where a whole one is left, by the element at the end.
template <Element kElement>
struct Row;

template <>
struct Row<Element::kFloat32> {
    const float* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const float*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return data[e]; }
    template <class V>
    V vector(int64_t e) const {
        return V::load(data + e);
    }
};

template <>
struct Row<Element::kFloat16> {
    const uint16_t* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const uint16_t*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return half_to_float(data[e]); }
    template <class V>
    V vector(int64_t e) const {
        return V::load_half(data + e);
    }
};

template <>
struct Row<Element::kBFloat16> {
    const uint16_t* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const uint16_t*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return bfloat_to_float(data[e]); }
    template <class V>
    V vector(int64_t e) const {
        return V::load_bfloat(data + e);
    }
};

template <>
struct Row<Element::kInt8> {
    const int8_t* data;
    float scale;
    Row(const Rows& rows, int64_t row)
        : data(static_cast<const int8_t*>(rows.data) + row * rows.dim), scale(rows.scale[row]) {}
    float operator()(int64_t e) const { return static_cast<float>(data[e]) * scale; }
    template <class V>
    V vector(int64_t e) const {
        return V::load_byte(data + e) * V::all(scale);
    }
};

// Fetches what stands kPrefetchBytes behind element e of a row, in the rows that follow: the processor itself looks no
// further than to the end of a page. Beyond the last row nothing happens.
constexpr int64_t kPrefetchBytes = 4096;
template <class RowType>
inline void prefetch(RowType row, int64_t e) {
    __builtin_prefetch(reinterpret_cast<const char*>(row.data + e) + kPrefetchBytes);
}

// Calls function(row) with the row's own type.
template <class Function>
inline void with_row(const Rows& rows, int64_t row, Function function) {
    switch (rows.element) {
        case Element::kFloat32:
            return function(Row<Element::kFloat32>(rows, row));
        case Element::kFloat16:
            return function(Row<Element::kFloat16>(rows, row));
        case Element::kBFloat16:
            return function(Row<Element::kBFloat16>(rows, row));
        case Element::kInt8:
            return function(Row<Element::kInt8>(rows, row));
    }
}

// A row as float32, padded with zeros to whole vectors of `multiple` elements.
template <class V, class RowType>
inline void widen(RowType row, int64_t dim, int multiple, float* out) {
    int64_t e = 0;
    for (; e + V::kWidth <= dim; e += V::kWidth) {
        prefetch(row, e);
        row.template vector<V>(e).store(out + e);
    }
    for (; e < dim; ++e) out[e] = row(e);
    for (; e % multiple != 0; ++e) out[e] = 0;
}

template <class V>
bool pack_row(const Rows& rows, int64_t index, const float* centre, const float* axis, uint8_t* codes, float* stats,
              int place) {
    const int64_t dim = rows.dim;
    const int64_t padded = (dim + 15) / 16 * 16;
    alignas(64) float centred[kMaxDim];
    alignas(64) uint8_t bytes[kMaxDim];
    with_row(rows, index, [&](auto row) { widen<V>(row, dim, 16, centred); });

    V largest = V::all(0), along = V::all(0), probe = V::all(0);
    for (int64_t e = 0; e < padded; e += V::kWidth) {  // centre and axis are padded too
        const V d = V::load(centred + e) - V::load(centre + e);
        d.store(centred + e);
        largest = V::max(largest, d.abs());
        along = V::fma(d, V::load(axis + e), along);
        probe = V::fma(d, V::all(0), probe);  // NaN from infinity or NaN
    }
    const float reach = largest.largest();
    const bool finite = probe.sum() == 0;
    // Tiny rows are out of reach of relative bounds, and with huge ones the bound's own arithmetic may overflow; both
    // are kept for the exact routine by an infinite error.
    const bool bounded = finite && (reach == 0 || (reach > 1e-30f && reach < kMaxReach));
    const float step = bounded ? reach / 127 : 0;
    const V scale = V::all(step > 0 ? 127 / reach : 0);

    V y_square = V::all(0), rest_square = V::all(0);
    for (int64_t e = 0; e < padded; e += V::kWidth) {
        const V y = bounded ? V::load(centred + e) * scale : V::all(0);
        const V c = y.round_to_bytes(bytes + e);  // c + 128
        const V rest = y - c;                     // exact
        y_square = V::fma(y, y, y_square);
        rest_square = V::fma(rest, rest, rest_square);
    }
    for (int64_t e = 0; e < dim; e += 4) memcpy(codes + (e * kPanelRows + place * 4), bytes + e, 4);

    // |e| <= step (|rest| + 16 w |y|): y, step and the centring are each rounded once or twice. Both sums of
    // squares are off by less than (dim / 4 + 16) w < 2^-14 of themselves.
    const double y_norm = std::sqrt(static_cast<double>(y_square.sum())) * (1 + 0x1p-14);
    const double rest_norm = std::sqrt(static_cast<double>(rest_square.sum())) * (1 + 0x1p-14);
    stats[kStep * kPanelRows + place] = step;
    stats[kAlong * kPanelRows + place] = bounded ? along.sum() : 0;
    stats[kLength * kPanelRows + place] = static_cast<float>(step * (y_norm + rest_norm) * (1 + 0x1p-20));
    stats[kError * kPanelRows + place] = bounded
                                             ? static_cast<float>(step * (rest_norm + 0x1p-20 * y_norm) * (1 + 0x1p-20))
                                             : std::numeric_limits<float>::infinity();
    return finite;
}

// As exact_score, the lanes in vectors. The zeros that fill up the last step leave every partial sum as it is.
template <class V>
float exact(const Rows& rows, int64_t index, const float* query) {
    typename V::Doubles sums[kExactLanes / V::Doubles::kWidth] = {};
    constexpr int kPerVector = V::kWidth / V::Doubles::kWidth;
    with_row(rows, index, [&](auto row) {
        const int64_t dim = rows.dim;
        int64_t e = 0;
        for (; e + kExactLanes <= dim; e += kExactLanes) {
            for (int i = 0; i < kExactLanes / V::kWidth; ++i) {
                V::add_products(V::load(query + e + i * V::kWidth), row.template vector<V>(e + i * V::kWidth),
                                sums + i * kPerVector);
            }
        }
        if (e == dim) return;
        alignas(64) float last[kExactLanes] = {};
        for (int64_t i = 0; e + i < dim; ++i) last[i] = row(e + i);
        for (int i = 0; i < kExactLanes / V::kWidth; ++i) {
            V::add_products(V::load(query + e + i * V::kWidth), V::load(last + i * V::kWidth), sums + i * kPerVector);
        }
    });
    alignas(64) double lanes[kExactLanes];
    memcpy(lanes, sums, sizeof lanes);
    for (int step = kExactLanes / 2; step > 0; step /= 2) {
        for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    }
    return exact_round(lanes[0]);
}

template <class V>
void dot(const Rows& rows, int64_t index, const float* query, float* product, float* square) {
    with_row(rows, index, [&](auto row) {
        const int64_t dim = rows.dim;
        V products[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
        V squares[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
        int64_t e = 0;
        for (; e + 4 * V::kWidth <= dim; e += 4 * V::kWidth) {
            for (int i = 0; i < 4; ++i) {
                prefetch(row, e + i * V::kWidth);
                const V x = row.template vector<V>(e + i * V::kWidth);
                products[i] = V::fma(x, V::load(query + e + i * V::kWidth), products[i]);
                squares[i] = V::fma(x, x, squares[i]);
            }
        }
        float product_rest = 0, square_rest = 0;
        for (; e < dim; ++e) {
            const float x = row(e);
            product_rest += x * query[e];
            square_rest += x * x;
        }
        *product = ((products[0] + products[1]) + (products[2] + products[3])).sum() + product_rest;
        *square = ((squares[0] + squares[1]) + (squares[2] + squares[3])).sum() + square_rest;
    });
}

// What remains of a pass once g.c is there: first_pass.hpp's `upper` and its test. The sums come in memory, so that
// the loops before can keep theirs in registers.
template <class V>
uint32_t keep(const int32_t (*sums)[kPanelRows], const float* stats, const Tile& tile, Kept& kept) {
    uint32_t kept_queries = 0;
    for (int j = 0; j < tile.count; ++j) {
        const V along = V::all(tile.along[j]), length = V::all(tile.length[j]), error = V::all(tile.error[j]);
        const V theta = V::all(tile.theta[j]);
        uint32_t mask = 0;
        for (int row = 0; row < kPanelRows; row += V::kWidth) {
            V upper = V::load_int(sums[j] + row) * V::load(stats + kStep * kPanelRows + row);
            upper = V::fma(along, V::load(stats + kAlong * kPanelRows + row), upper);
            upper = V::fma(length, V::load(stats + kLength * kPanelRows + row), upper);
            upper = V::fma(error, V::load(stats + kError * kPanelRows + row), upper);
            upper.store(kept.upper[j] + row);
            mask |= V::not_below(upper, theta) << row;
        }
        kept.mask[j] = mask;
        kept_queries |= static_cast<uint32_t>(mask != 0) << j;
    }
    return kept_queries;
}

// A panel held against kQueries queries. Codes stands for the codes of Codes::kRows rows at one step, in registers:
// its add() takes the query's Codes::kWords words of that step and adds the products to a Codes::Sum. Two at a time
// and all their sums stay in registers, hence the unrolled loops.
template <class V, class Codes, int kQueries>
uint32_t pass_tile(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    alignas(64) int32_t sums[kQueries][kPanelRows];
    for (int row = 0; row < kPanelRows; row += 2 * Codes::kRows) {
        typename Codes::Sum low_sums[kQueries], high_sums[kQueries];
#pragma GCC unroll 12
        for (int j = 0; j < kQueries; ++j) low_sums[j] = high_sums[j] = Codes::Sum::all(tile.start[j]);
        const int32_t* query = static_cast<const int32_t*>(tile.codes);
        const uint8_t* at = codes + row * 4;
        for (int64_t step = 0; step < steps; ++step, at += kPanelRows * 4) {
            const Codes low(at), high(at + Codes::kRows * 4);
#pragma GCC unroll 12
            for (int j = 0; j < kQueries; ++j, query += Codes::kWords) {
                low.add(query, low_sums[j]);
                high.add(query, high_sums[j]);
            }
        }
#pragma GCC unroll 12
        for (int j = 0; j < kQueries; ++j) {
            low_sums[j].store(sums[j] + row);
            high_sums[j].store(sums[j] + row + Codes::kRows);
        }
    }
    return keep<V>(sums, stats, tile, kept);
}

// Kernels::pass for tiles of up to kMost queries.
template <class V, class Codes, int kMost>
uint32_t pass(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    if constexpr (kMost > 1) {
        if (tile.count < kMost) return pass<V, Codes, kMost - 1>(codes, stats, steps, tile, kept);
    }
    return pass_tile<V, Codes, kMost>(codes, stats, steps, tile, kept);
}

}  // namespace
}  // namespace valm
