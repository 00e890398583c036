// The definitions of a score and of "better". Every implementation, CPU or CUDA, ends in these two definitions,
// so their results agree bit for bit.
//
// The score of a float32 query and a stored row (each element read as float32: a 16-bit element widened, an
// int8 element times its row's scale, rounded to float32) is the sum of the products in float64, in this order:
// kExactLanes partial sums, partial sum l over the elements l, l + kExactLanes, ... from low to high, each
// starting at +0; then partial sum l + 16 is added to partial sum l, then l + 8, l + 4, l + 2, l + 1; then one
// rounding to float32, where -0 becomes +0. A product of two float32 numbers is exact in float64, so a fused
// multiply-add gives the same bits as a product and a sum. 32 lanes are one warp, or four AVX-512 registers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VALM_HOST_DEVICE __host__ __device__
#else
#define VALM_HOST_DEVICE
#endif

namespace valm {

constexpr int kExactLanes = 32;

// Internal linkage throughout: this header is compiled for several instruction sets, and the linker must never
// hand the code of one to another.
namespace {

// Partial sum `lane` of the score. `row(e)` is element e of the stored row as float.
template <class Row>
VALM_HOST_DEVICE inline double exact_lane(const float* query, Row row, int64_t dim, int lane) {
    double sum = 0;
    for (int64_t e = lane; e < dim; e += kExactLanes) {
        sum += static_cast<double>(query[e]) * static_cast<double>(row(e));
    }
    return sum;
}

VALM_HOST_DEVICE inline float exact_round(double sum) { return static_cast<float>(sum) + 0.0f; }

// The whole score on one thread.
template <class Row>
VALM_HOST_DEVICE inline float exact_score(const float* query, Row row, int64_t dim) {
    double lanes[kExactLanes];
    for (int lane = 0; lane < kExactLanes; ++lane) lanes[lane] = exact_lane(query, row, dim, lane);
    for (int step = kExactLanes / 2; step > 0; step /= 2) {
        for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    }
    return exact_round(lanes[0]);
}

// The order of the result as one integer: a larger key is a higher score or, among equal scores, a lower row.
// Rows are below 2^32. Zero is below every key of a real candidate, so it can stand for "none yet".
VALM_HOST_DEVICE inline uint64_t candidate_key(float score, uint32_t row) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~row);
}

VALM_HOST_DEVICE inline float key_score(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

VALM_HOST_DEVICE inline uint32_t key_row(uint64_t key) { return ~static_cast<uint32_t>(key); }

}  // namespace
}  // namespace valm
