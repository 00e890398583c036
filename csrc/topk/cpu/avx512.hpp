// Common code of the AVX-512 kernels with and without VNNI.
#pragma once

#include <immintrin.h>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

// Sixteen 32-bit sums.
struct Integers {
    __m512i v;

    static Integers zero() { return {_mm512_setzero_si512()}; }
    void store(int32_t* p) const { _mm512_store_si512(p, v); }
};

}  // namespace
}  // namespace valm
