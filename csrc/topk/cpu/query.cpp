#include "topk/cpu/query.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "topk/cpu/matrix.hpp"
#include "topk/exact.hpp"

namespace valm {

namespace {

constexpr double kUnitRoundoff = 0x1p-24;  // w of first_pass.hpp
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();

double norm(const float* values, int64_t dim) {
    double square = 0;
    for (int64_t e = 0; e < dim; ++e) square += static_cast<double>(values[e]) * values[e];
    return std::sqrt(square);
}

// The next number above or below. (The call of std::nextafter is slow.) Nothing lies beyond an infinity.
float next_float(float value, bool up) {
    if (value == 0) return up ? kSmallest : -kSmallest;
    const uint64_t key = candidate_key(value, 0), one = uint64_t{1} << 32;
    const float next = key_score(up ? key + one : key - one);
    return std::isnan(next) ? value : next;
}

}  // namespace

int query_levels(const Kernels& kernels, int64_t dim) {
    if (kernels.layout != QueryLayout::kWords) return 127;
    const int64_t padded = (dim + 3) / 4 * 4;
    return static_cast<int>(std::min<int64_t>(32767, (int64_t{1} << 31) / (256 * padded) - 1));
}

Query prepare_query(const float* values, const PackedRows& packed, int64_t dim, int levels, int16_t* g) {
    Query query = {};
    query.values = values;
    query.norm = norm(values, dim);
    double base = 0, dot_axis = 0;
    for (int64_t e = 0; e < dim; ++e) {
        base += static_cast<double>(values[e]) * packed.centre[e];
        dot_axis += static_cast<double>(values[e]) * packed.axis[e];
    }
    const double a = static_cast<float>(dot_axis);  // any a is correct; this one minimises |p|

    const auto rest = [&](int64_t e) { return values[e] - a * packed.axis[e]; };  // p
    double largest = 0, rest_square = 0;
    for (int64_t e = 0; e < dim; ++e) {
        const double p = rest(e);
        largest = std::max(largest, std::abs(p));
        rest_square += p * p;
    }
    // at least 2^-40 |a|, so that A cannot make the bound overflow
    const double unit = std::max(largest / levels, std::abs(a) * 0x1p-40);
    // a query too small for relative bounds keeps g = 0, and all of it is in f
    const bool tiny = unit < 1e-30;
    query.unit = tiny ? 1 : unit;
    int64_t sum = 0;
    double g_square = 0, left_square = 0;
    std::fill_n(g, (dim + 3) / 4 * 4, int16_t{0});
    if (!tiny) {
        for (int64_t e = 0; e < dim; ++e) {
            const double p = rest(e);
            const double integer = std::nearbyint(p / unit);
            const double left = p - unit * integer;  // f
            g[e] = static_cast<int16_t>(integer);
            sum += g[e];
            g_square += integer * integer;
            left_square += left * left;
        }
    } else {
        left_square = rest_square;
    }
    // the float64 arithmetic above is off by less than these shares of |q|
    const double small = 0x1p-50 * static_cast<double>(dim) * query.norm;
    const double left = std::sqrt(left_square) * (1 + 0x1p-30) + small;
    const double along = std::abs(a) / query.unit;
    const double along_error = (static_cast<double>(dim) / 4 + 16) * kUnitRoundoff * (1 + 0x1p-10);
    const double arithmetic = 8 * kUnitRoundoff * (1 + 0x1p-10);
    const double up = 1 + 0x1p-20;
    query.start = static_cast<int32_t>(-128 * sum);
    query.along = static_cast<float>(a / query.unit);
    query.length = static_cast<float>(
        up * ((left + small) / query.unit + along * along_error + arithmetic * (std::sqrt(g_square) + along)));
    query.error = static_cast<float>(up * (std::sqrt(rest_square) * (1 + 0x1p-30) + small) / query.unit);
    query.base = base;
    query.slack = small * norm(packed.centre, dim) + 1e-33 * (1 + query.norm);
    return query;
}

Query prepare_float_query(const float* values, int64_t dim) {
    Query query = {};
    query.values = values;
    query.norm = norm(values, dim);
    query.unit = 1;
    query.slack = 1e-33 * (1 + query.norm);
    return query;
}

int64_t tile_bytes(QueryLayout layout, int64_t steps, int count) {
    const int64_t bytes = layout == QueryLayout::kMatrix  ? matrices(steps) * kMaxTile * kMatrixBytes
                          : layout == QueryLayout::kBytes ? steps * count * 4
                                                          : steps * count * 8;
    return (bytes + 63) / 64 * 64;
}

void lay_out(QueryLayout layout, const int16_t* g, int64_t steps, int count, int j, void* codes) {
    int16_t* words = static_cast<int16_t*>(codes);
    int8_t* bytes = static_cast<int8_t*>(codes);
    if (layout == QueryLayout::kMatrix) {
        for (int64_t m = 0; m < matrices(steps); ++m, bytes += kMaxTile * kMatrixBytes) {
            const int64_t first = m * (kMatrixBytes / 4), skipped = first - first_step(steps, m);
            const int64_t held = std::min(steps - first, matrix_steps(steps));
            std::copy_n(g + first * 4, held * 4, bytes + j * kMatrixBytes + skipped * 4);
        }
        return;
    }
    for (int64_t step = 0; step < steps; ++step, g += 4) {
        const int64_t at = (step * count + j) * 4;
        if (layout == QueryLayout::kBytes) {
            std::copy_n(g, 4, bytes + at);
        } else {
            const int16_t ordered[4] = {g[0], g[2], g[1], g[3]};
            std::copy_n(ordered, 4, words + at);
        }
    }
}

// At least 16 partial sums of at most dim / 16 + 64 roundings each, or up to 64 elements one by one. The exact
// routine's own error is far below the factor.
double float_error(int64_t dim) { return (static_cast<double>(dim) / 16 + 80) * kUnitRoundoff * (1 + 0x1p-10); }

float threshold(const Query& query, uint64_t kth, bool after) {
    if (kth == 0) return -kInfinity;
    const float score = key_score(kth);
    const float neighbour = next_float(score, after);
    const double half_way = std::isfinite(score) && std::isfinite(neighbour)
                                ? 0.5 * (static_cast<double>(score) + neighbour)
                                : std::min(score, neighbour);
    const double bound = (half_way - query.base - query.slack) / query.unit;
    const float rounded = static_cast<float>(bound);
    return rounded > bound ? next_float(rounded, false) : rounded;
}

}  // namespace valm
