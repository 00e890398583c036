// The row kernels, written once over the vectors of simd/vector.hpp and included by the file of each instruction set.
// Everything has internal linkage: the linker must never hand code of one instruction set to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "topk/cpu/first_pass.hpp"
#include "topk/cpu/row.hpp"
#include "topk/exact.hpp"

namespace valm {
namespace {

constexpr int64_t kMaxDim = 2048;
constexpr int kWidth = Lanes<float>::count;

// A row as float32, padded with zeros to whole vectors of `multiple` elements.
template <class RowType>
inline void widen(RowType row, int64_t dim, int multiple, float* out) {
    int64_t e = 0;
    for (; e + kWidth <= dim; e += kWidth) {
        prefetch(row, e);
        store_vector(out + e, row.vector(e));
    }
    for (; e < dim; ++e) out[e] = row(e);
    for (; e % multiple != 0; ++e) out[e] = 0;
}

bool pack_row(const Rows& rows, int64_t index, const float* centre, const float* axis, uint8_t* codes, float* stats,
              int place) {
    const int64_t dim = rows.dim;
    const int64_t padded = (dim + 15) / 16 * 16;
    alignas(64) float centred[kMaxDim];
    alignas(64) uint8_t bytes[kMaxDim];
    with_row(rows, index, [&](auto row) { widen(row, dim, 16, centred); });

    FloatVector largest = {}, along = {}, probe = {};
    for (int64_t e = 0; e < padded; e += kWidth) {  // centre and axis are padded too
        const FloatVector d = load_floats(centred + e) - load_floats(centre + e);
        store_vector(centred + e, d);
        largest = larger_of(largest, abs_of(d));
        along += d * load_floats(axis + e);
        probe += d * 0.0f;  // NaN for infinity or NaN
    }
    const float reach = largest_of(largest);
    const bool finite = sum_of(probe) == 0;
    // Relative bounds do not hold for tiny rows, and for huge rows the bound's own arithmetic may overflow. An
    // infinite error passes such rows on to the exact routine.
    const bool bounded = finite && (reach == 0 || (reach > 1e-30f && reach < kMaxReach));
    const float step = bounded ? reach / 127 : 0;
    const float scale = step > 0 ? 127 / reach : 0;

    FloatVector y_square = {}, rest_square = {};
    for (int64_t e = 0; e < padded; e += kWidth) {
        const FloatVector y = bounded ? load_floats(centred + e) * scale : FloatVector{};
        const FloatVector c = round_to_bytes(y, bytes + e);  // c + 128
        const FloatVector rest = y - c;                      // exact
        y_square += y * y;
        rest_square += rest * rest;
    }
    for (int64_t e = 0; e < dim; e += 4) memcpy(codes + (e * kPanelRows + place * 4), bytes + e, 4);

    // |e| <= step (|rest| + 16 w |y|): y, step and the centring are each rounded once or twice. Both sums of
    // squares are off by less than (dim / 4 + 16) w < 2^-14 of themselves.
    const double y_norm = std::sqrt(static_cast<double>(sum_of(y_square))) * (1 + 0x1p-14);
    const double rest_norm = std::sqrt(static_cast<double>(sum_of(rest_square))) * (1 + 0x1p-14);
    stats[kStep * kPanelRows + place] = step;
    stats[kAlong * kPanelRows + place] = bounded ? sum_of(along) : 0;
    stats[kLength * kPanelRows + place] = static_cast<float>(step * (y_norm + rest_norm) * (1 + 0x1p-20));
    stats[kError * kPanelRows + place] = bounded
                                             ? static_cast<float>(step * (rest_norm + 0x1p-20 * y_norm) * (1 + 0x1p-20))
                                             : std::numeric_limits<float>::infinity();
    return finite;
}

// As exact_score, with the lanes in vectors. The zeros that pad the last step change no partial sum.
float exact(const Rows& rows, int64_t index, const float* query) {
    DoubleVector sums[kExactLanes / Lanes<double>::count] = {};
    with_row(rows, index, [&](auto row) {
        const int64_t dim = rows.dim;
        int64_t e = 0;
        for (; e + kExactLanes <= dim; e += kExactLanes) {
            for (int i = 0; i < kExactLanes / kWidth; ++i) {
                add_products(load_floats(query + e + i * kWidth), row.vector(e + i * kWidth), sums + i * 2);
            }
        }
        if (e == dim) return;
        alignas(64) float last[kExactLanes] = {};
        for (int64_t i = 0; e + i < dim; ++i) last[i] = row(e + i);
        for (int i = 0; i < kExactLanes / kWidth; ++i) {
            add_products(load_floats(query + e + i * kWidth), load_floats(last + i * kWidth), sums + i * 2);
        }
    });
    alignas(64) double lanes[kExactLanes];
    memcpy(lanes, sums, sizeof lanes);
    for (int step = kExactLanes / 2; step > 0; step /= 2) {
        for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    }
    return exact_round(lanes[0]);
}

void dot(const Rows& rows, int64_t index, const float* query, float* product, float* square) {
    with_row(rows, index, [&](auto row) {
        const int64_t dim = rows.dim;
        FloatVector products[4] = {}, squares[4] = {};
        int64_t e = 0;
        for (; e + 4 * kWidth <= dim; e += 4 * kWidth) {
            for (int i = 0; i < 4; ++i) {
                prefetch(row, e + i * kWidth);
                const FloatVector x = row.vector(e + i * kWidth);
                products[i] += x * load_floats(query + e + i * kWidth);
                squares[i] += x * x;
            }
        }
        float product_rest = 0, square_rest = 0;
        for (; e < dim; ++e) {
            const float x = row(e);
            product_rest += x * query[e];
            square_rest += x * x;
        }
        *product = sum_of((products[0] + products[1]) + (products[2] + products[3])) + product_rest;
        *square = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) + square_rest;
    });
}

// The integer sums of a tile's queries and a panel's rows.
using Sums = int32_t[kMaxTile][kPanelRows];

// The rest of a pass after g.c, for queries [begin, end) of a tile: first_pass.hpp's `upper` and its test. The sums,
// without `start`, are passed in memory, so that the loops before can hold their sums in registers.
Hit* keep(const Sums& sums, const float* stats, const Tile& tile, int begin, int end, const float* theta, Hit* hits) {
    for (int j = begin; j < end; ++j) {
        const FloatVector along = splat(tile.along[j]), length = splat(tile.length[j]);
        const FloatVector error = splat(tile.error[j]), bar = splat(theta[tile.first + j]);
        alignas(64) float upper[kPanelRows];
        uint32_t mask = 0;
        for (int row = 0; row < kPanelRows; row += kWidth) {
            FloatVector bound = to_float(load_vector<IntVector>(sums[j] + row) + tile.start[j]);
            bound *= load_floats(stats + kStep * kPanelRows + row);
            bound += along * load_floats(stats + kAlong * kPanelRows + row);
            bound += length * load_floats(stats + kLength * kPanelRows + row);
            bound += error * load_floats(stats + kError * kPanelRows + row);
            store_vector(upper + row, bound);
            mask |= not_below(bound, bar) << row;
        }
        for (; mask != 0; mask &= mask - 1) {
            const int row = __builtin_ctz(mask);
            *hits++ = {upper[row], static_cast<uint16_t>(tile.first + j), static_cast<uint16_t>(row)};
        }
    }
    return hits;
}

// The sums of a tile of kQueries queries. Codes stands for the codes of Codes::kRows rows at one step, in registers:
// its add() takes the query's Codes::kWords words of that step and adds the products to a Codes::Sum. The loops are
// unrolled, so that two Codes and all their sums stay in registers.
template <class Codes, int kQueries>
void multiply_tile(const Panel& panel, const Tile& tile, Sums& sums) {
    for (int row = 0; row < kPanelRows; row += 2 * Codes::kRows) {
        typename Codes::Sum low_sums[kQueries], high_sums[kQueries];
#pragma GCC unroll 12
        for (int j = 0; j < kQueries; ++j) low_sums[j] = high_sums[j] = Codes::Sum::zero();
        const int32_t* query = static_cast<const int32_t*>(tile.codes);
        const uint8_t* at = panel.codes + row * 4;
        for (int64_t step = 0; step < panel.steps; ++step, at += kPanelRows * 4) {
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
}

// The sums of a tile of up to kMost queries.
template <class Codes, int kMost>
void multiply(const Panel& panel, const Tile& tile, Sums& sums) {
    if constexpr (kMost > 1) {
        if (tile.count < kMost) return multiply<Codes, kMost - 1>(panel, tile, sums);
    }
    multiply_tile<Codes, kMost>(panel, tile, sums);
}

// Kernels::pass, by way of multiply(panel, tile, sums).
template <void (*multiply)(const Panel&, const Tile&, Sums&)>
Hit* pass(const Panel& panel, const Tile* tiles, size_t n_tiles, const float* theta, Hit* hits) {
    alignas(64) Sums sums;
    for (const Tile* tile = tiles; tile != tiles + n_tiles; ++tile) {
        multiply(panel, *tile, sums);
        hits = keep(sums, panel.stats, *tile, 0, tile->count, theta, hits);
    }
    return hits;
}

}  // namespace
}  // namespace valm
