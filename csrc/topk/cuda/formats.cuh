// How the kernels of top-K search read a row, in each type that rows are stored in, and the norms of the rows.
//
// In the first pass 4 lanes share a slab of a row. The order of the elements does not matter for the sum, so each lane
// takes the elements that it can copy at once, a Part. words() turns it into the words of each term of the row, of two
// 16-bit values or four 8-bit values.
#pragma once

#include "topk/cuda/device.cuh"
#include "topk/cuda/plan.hpp"

namespace valm {

__device__ inline float bfloat16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// The base of the two digits of a query's element, for int8 rows.
constexpr int kDigitBase = 256;

template <MmaInput kInput>
__device__ inline uint32_t pack(float low, float high) {
    return kInput == MmaInput::kFloat16 ? pack_float16(low, high) : pack_bfloat16(low, high);
}

template <MmaInput kInput>
__device__ inline float unpack(uint16_t bits) {
    return kInput == MmaInput::kFloat16 ? float16_value(bits) : bfloat16_value(bits);
}

// The next term of a query's elements as a word, which it subtracts from them: two elements as the nearest 16-bit
// values, or four as digits to the base kDigitBase, where term 0 holds the high digits.
template <MmaInput kInput>
__device__ inline uint32_t take_term(int term, double* rest) {
    if constexpr (kInput == MmaInput::kInt8) {
        const int unit = term == 0 ? kDigitBase : 1;
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int digit = static_cast<int>(min(rint(rest[i] / unit), 127.0));
            rest[i] -= digit * unit;
            word |= (static_cast<uint32_t>(digit) & 0xffu) << (8 * i);
        }
        return word;
    } else {
        const uint32_t word = pack<kInput>(static_cast<float>(rest[0]), static_cast<float>(rest[1]));
        rest[0] -= unpack<kInput>(word & 0xffffu);
        rest[1] -= unpack<kInput>(word >> 16);
        return word;
    }
}

struct Float16Rows {
    using Value = uint16_t;
    using Part = uint4;
    static constexpr Element kElement = Element::kFloat16;
    static constexpr MmaInput kInput = MmaInput::kFloat16;
    static constexpr int kRowTerms = 1;
    // Queries are scaled to a largest magnitude in [2^14, 2^15): the least loss to float16's subnormals.
    static constexpr int kQueryExponent = 15;

    static __device__ void words(const Part& part, uint32_t (&out)[1][4]) {
        out[0][0] = part.x, out[0][1] = part.y, out[0][2] = part.z, out[0][3] = part.w;
    }
    static __device__ float value(Value element, float) { return float16_value(element); }
};

struct BFloat16Rows {
    using Value = uint16_t;
    using Part = uint4;
    static constexpr Element kElement = Element::kBFloat16;
    static constexpr MmaInput kInput = MmaInput::kBFloat16;
    static constexpr int kRowTerms = 1;
    static constexpr int kQueryExponent = 1;

    static __device__ void words(const Part& part, uint32_t (&out)[1][4]) { Float16Rows::words(part, out); }
    static __device__ float value(Value element, float) { return bfloat16_value(element); }
};

struct Float32Rows {
    using Value = float;
    using Part = float4;
    static constexpr Element kElement = Element::kFloat32;
    static constexpr MmaInput kInput = MmaInput::kBFloat16;
    static constexpr int kRowTerms = 2;  // bfloat16 high and low part
    static constexpr int kQueryExponent = 1;

    static __device__ void split(float a, float b, uint32_t& high, uint32_t& low) {
        high = pack_bfloat16(a, b);
        low = pack_bfloat16(a - bfloat16_value(high & 0xffffu), b - bfloat16_value(high >> 16));
    }
    static __device__ void words(const Part& part, uint32_t (&out)[2][2]) {
        split(part.x, part.y, out[0][0], out[1][0]);
        split(part.z, part.w, out[0][1], out[1][1]);
    }
    static __device__ float value(Value element, float) { return element; }
};

struct Int8Rows {
    using Value = int8_t;
    using Part = uint4;
    static constexpr Element kElement = Element::kInt8;
    static constexpr MmaInput kInput = MmaInput::kInt8;
    static constexpr int kRowTerms = 1;
    // Below 2^14 a high digit is at most 64, so that the low digit leaves half a unit of an element, or one unit if it
    // would be 128. At 2^15 the high digit would not fit.
    static constexpr int kQueryExponent = 14;

    static __device__ void words(const Part& part, uint32_t (&out)[1][4]) { Float16Rows::words(part, out); }
    static __device__ float value(Value element, float scale) { return static_cast<float>(element) * scale; }
};

template <class Format>
constexpr int kPartElements = slab_elements(Format::kElement) / 4;

// Values in a word, and words of a part.
template <class Format>
constexpr int kWordValues = Format::kInput == MmaInput::kInt8 ? 4 : 2;
template <class Format>
constexpr int kPartWords = kPartElements<Format> / kWordValues<Format>;

// mma instructions for one product of a slab.
template <class Format>
constexpr int kSteps = kPartWords<Format> / 2;

// 8 elements from `first` on as floats.
template <class Format>
__device__ inline void load_values(const typename Format::Value* row, float scale, int first, float (&values)[8]) {
    struct alignas(sizeof(typename Format::Value) == 1 ? 8 : 16) Eight {
        typename Format::Value element[8];
    };
    const Eight eight = *reinterpret_cast<const Eight*>(row + first);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = Format::value(eight.element[j], scale);
}

template <class Format>
__device__ inline const typename Format::Value* row_at(const Rows& rows, int64_t row) {
    return static_cast<const typename Format::Value*>(rows.data) + row * rows.dim;
}

template <class Format>
__device__ inline float scale_at(const Rows& rows, int64_t row) {
    return Format::kElement == Element::kInt8 ? rows.scale[row] : 1.0f;
}

struct RowNorms {
    Rows rows;
    float* norms;  // (rows.count)
};

// An upper bound of each row's norm; NaN for a row with an element that is not finite, infinity for a norm above 2^64:
// the first pass's sums for such a row may overflow, and only an infinite bound keeps the row.
template <class Format>
__global__ __launch_bounds__(kThreads) void row_norms_kernel(RowNorms s) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 4) + threadIdx.x / 4;
    const int64_t there = min(row, s.rows.count - 1);  // all lanes take part in the shuffles
    const auto* elements = row_at<Format>(s.rows, there);
    const float scale = scale_at<Format>(s.rows, there);
    double sum = 0;
    for (int first = 8 * t; first < s.rows.dim; first += kScanSlab) {
        float values[8];
        load_values<Format>(elements, scale, first, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += static_cast<double>(values[j]) * values[j];
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const bool finite = sum <= 1e100;  // 2048 squares of finite floats are below
    if (t == 0 && row < s.rows.count) {
        const float norm = sum > 0x1p128 ? INFINITY : static_cast<float>(sqrt(sum) * (1 + 0x1p-20) + 0x1p-96);
        s.norms[row] = finite ? norm : NAN;
    }
}

}  // namespace valm
