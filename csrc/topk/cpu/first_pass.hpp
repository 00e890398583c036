// The first pass: an upper bound on each score, from 8-bit integers.
//
// Notation: q a query, x a row, both float32; m the centre and u the axis, one float32 vector each for the whole
// database (any vectors do; good ones are the mean row and its direction). |.| of a vector is its Euclidean norm.
//
//   row    x = m + d,  d = s c + e    c integers in [-127, 127], s the row's step, e the rounding error
//   query  q = a u + p,  p = t g + f  g integers in [-levels, levels], t the query's step, f the rounding error
//
// In real numbers, since q.x = q.m + q.d and q.d = a (u.d) + p.d and p.d = (t g + f).(s c) + p.e,
//
//   q.x = q.m + a (u.d) + t s (g.c) + f.(s c) + p.e
//       <= q.m + a (u.d) + t s (g.c) + |f| |s c| + |p| |e|                                 (Cauchy-Schwarz)
//
// A packed row holds four numbers: step s, along ~ u.d, length >= max(|d|, |s c|), error >= |e|. The kernel computes
// g.c exactly, in 32-bit integers, and evaluates in float32, in units of t,
//
//   upper = (g.c) step + A along + L length + R error          (multiply-adds, fused or not)
//
// and keeps the row unless upper < theta. No row of the result is lost: prepare_query adds to L, besides |f| / t, a
// bound of what the float32 arithmetic loses. With w = 2^-24 and |g.c| step <= |g| length, A along and the partial
// sums are each below (|g| + |a| / t) length (1 + 2^-10) in size; there are 2 roundings of the product, 2 of
// A along (1 where it is fused), 3 of the sums, and the products L length and R error carry a rounding of at most 4 w
// each, which a factor (1 + 2^-20) on L and R covers: 8 w (|g| + |a| / t) length is enough. `along` is off by at most
// (dim / 4 + 16) w |u| |d| (at least four partial sums, whatever the instruction set), which times |a| / t goes into
// L too. The exact routine's own float64 error, below dim 2^-52 |q| |x| with |x| <= |m| + length, and that of q.m,
// go into L (the part with length) and into theta (the part with |m|). Underflow anywhere loses less than 1e-33 times
// (1 + |q|), which theta makes up for. Nothing overflows to -inf, which no later term would lift: a row is packed only
// if the elements of d are below kMaxReach, other rows have an infinite error, and prepare_query keeps |A| <= 2^40, so
// with |g.c| < 2^31 and |d| < 46 kMaxReach the sum of the first two terms is within 6e37. The other two terms are never
// negative: if they overflow, upper is +inf or NaN, and "not less than" keeps the row.
//
// theta: let T be the kth best score so far, of row r. A row after r enters the result only if its score rounds to
// more than T, so only if it is at least half-way from T to the next float32. A row before r enters if its score is at
// least half-way from the previous float32 to T. theta is this bound less q.m, less the slacks above, over t, rounded
// down.
#pragma once

#include <cstdint>
#include <vector>

#include "topk/topk.hpp"

namespace valm {

// Rows with an element this far from the centre are not bounded.
constexpr float kMaxReach = 1e24f;

// A row's four numbers in PackedRows::stats.
enum Stat { kStep, kAlong, kLength, kError };

// The memory layout of the integers of a tile's queries; query.hpp writes them.
enum class QueryLayout {
    kWords,   // (steps, count, 4) int16, each four in the order 0 2 1 3
    kBytes,   // (steps, count, 4) int8: levels is 127
    kMatrix,  // (matrices, kMaxTile, kMatrixBytes) int8, of matrix.hpp: levels is 127
};

// Queries that share what a kernel loads of a panel, and per query the coefficients of `upper`.
constexpr int kMaxTile = 32;
struct Tile {
    int first, count;         // its queries in the group
    const void* codes;        // g, at a multiple of 64 bytes
    int32_t start[kMaxTile];  // -128 times the sum of g: the stored codes are c + 128
    float along[kMaxTile];    // A
    float length[kMaxTile];   // L
    float error[kMaxTile];    // R
};

// kPanelRows packed rows.
struct Panel {
    const uint8_t* codes;  // (steps, kPanelRows, 4)
    const float* stats;    // (kStats, kPanelRows)
    int64_t steps;
};

// A row that a query keeps.
struct Hit {
    float upper;
    uint16_t query;  // of the group
    uint16_t row;    // of the panel
};

// The kernels of one instruction set. Queries are padded with zeros to a multiple of 32 elements.
struct Kernels {
    QueryLayout layout;
    int tile_queries;   // at most kMaxTile
    int group_queries;  // at most kMaxGroup: their integers, at E = 768, stay in the second-level cache
    // A thread calls these before and after the passes of a block; null: nothing to do. Between blocks a signal handler
    // may run, which may use AMX too and leave its tiles in any state.
    void (*begin)(int64_t steps);
    void (*end)();
    // Writes to `hits` the rows of a panel that the queries of n_tiles tiles keep, and returns the end of these hits.
    // theta is the group's.
    Hit* (*pass)(const Panel& panel, const Tile* tiles, size_t n_tiles, const float* theta, Hit* hits);
    // Packs row `row` as row `place` of a panel. Returns false if its numbers, less the centre, are not finite.
    bool (*pack_row)(const Rows& rows, int64_t row, const float* centre, const float* axis, uint8_t* codes,
                     float* stats, int place);
    // The float32 dot product with a row and the row's squared norm, for a bound without a packed copy.
    void (*dot)(const Rows& rows, int64_t row, const float* query, float* product, float* square);
    // The score, bit for bit as in exact.hpp.
    float (*exact)(const Rows& rows, int64_t row, const float* query);
};

constexpr int kMaxGroup = 1024;

extern const Kernels kTiles, kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni, kAmxInt8;
#endif

// The kernels for one of cpu_isas(); throws std::invalid_argument for any other name.
const Kernels& topk_kernels(const std::string& isa);

int64_t element_bytes(Element element);
bool row_is_finite(const Rows& rows, int64_t row);

// The mean of a sample of the rows, and its direction.
void find_centre(const Rows& rows, float* centre, float* axis);

// Centre and axis, padded with zeros to whole vectors, as Kernels::pack_row wants them.
struct PaddedCentre {
    PaddedCentre(const PackedRows& packed, int64_t dim);
    std::vector<float> centre, axis;
};

// Packs the rows of panel `panel` into the place-th panel of packed. Returns the first row that holds NaN or
// infinity, or -1.
int64_t pack_panel(const Kernels& kernels, const Rows& rows, const PackedRows& packed, const PaddedCentre& padded,
                   int64_t panel, int64_t place);

}  // namespace valm
