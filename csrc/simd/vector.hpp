// Vectors of the widest registers that the including file is compiled for, by the compiler's vector extension.
// Everything is local to the including file: each instruction set gets its own copy, and the linker must never hand the
// code of one to another.
#pragma once

#include <cstdint>
#include <cstring>

namespace valm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t ByteVector __attribute__((vector_size(kVectorBytes / 4)));

template <typename Wide>
struct Lanes;
template <>
struct Lanes<float> {
    using Vector = FloatVector;
    static constexpr int count = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
    using Vector = DoubleVector;
    static constexpr int count = kVectorBytes / 8;
};

template <typename To, typename From>
To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// All lanes joined by halves; join(a, b) takes two vectors or two numbers.
template <typename Join>
float join_lanes(FloatVector x, Join join) {
#if defined(__AVX512F__)
    const auto eight = join(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    const auto eight = x;
#endif
#if defined(__AVX2__)
    const auto four =
        join(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
    const auto four = eight;
#endif
    const auto two = join(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
    return join(two[0], two[1]);
}

inline float sum_of(FloatVector x) {
    return join_lanes(x, [](auto a, auto b) { return a + b; });
}

inline float largest_of(FloatVector x) {
    return join_lanes(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline double sum_of(DoubleVector x) {
    double total = x[0];
    for (int i = 1; i < Lanes<double>::count; ++i) total += x[i];
    return total;
}

}  // namespace
}  // namespace valm
