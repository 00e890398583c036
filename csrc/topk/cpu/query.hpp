// A query prepared for the first pass, and the threshold that bounds are compared with. first_pass.hpp has the proof.
#pragma once

#include <cstdint>

#include "topk/cpu/first_pass.hpp"
#include "topk/exact.hpp"

namespace valm {

// Numbers of a query, padded with zeros, that the exact routine reads.
inline int64_t padded_dim(int64_t dim) { return (dim + kExactLanes - 1) / kExactLanes * kExactLanes; }

struct Query {
    int64_t output;       // its place in the result
    const float* values;  // (padded_dim)
    double base;          // q.m, which the bounds do not include
    double slack;         // in the score's unit
    double unit;          // t: a bound times unit, plus base, is a score
    double norm;          // |q|
    // copied to Tile, for a packed first pass
    int32_t start;
    float along, length, error;
};

// The largest |g| that cannot overflow a 32-bit sum over `dim` elements.
int query_levels(const Kernels& kernels, int64_t dim);

// Splits a query for a packed first pass and writes its integers g, (dim + 3) / 4 * 4 of them.
Query prepare_query(const float* values, const PackedRows& packed, int64_t dim, int levels, int16_t* g);

// The bytes of a tile of `count` queries, a multiple of 64.
int64_t tile_bytes(QueryLayout layout, int64_t steps, int count);

// Writes the integers of a tile's query j to its codes, which held zeros.
void lay_out(QueryLayout layout, const int16_t* g, int64_t steps, int count, int j, void* codes);

// A query for the float32 pass over unpacked rows: base 0, unit 1.
Query prepare_float_query(const float* values, int64_t dim);

// How far the float32 product with a row may be off the score, over |q| |x|.
double float_error(int64_t dim);

// The bound below which a row cannot enter the result, given the key of the kth best so far (0: fewer than k yet)
// and whether the row comes after the kth best.
float threshold(const Query& query, uint64_t kth, bool after);

}  // namespace valm
