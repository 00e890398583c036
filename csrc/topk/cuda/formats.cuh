// How the kernels of top-K search read a row, in each type that rows are stored in, and the norms of the rows.
//
// In the first pass 4 lanes share a slab of a row: for the sum the order of the elements is free, so each lane takes
// those that it can copy at once, a Part. words() turns it into words of two 16-bit values for each term of the row.
#pragma once

#include "topk/cuda/device.cuh"
#include "topk/cuda/plan.hpp"

namespace valm {

__device__ inline float bfloat16_value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

template <MmaInput kInput>
__device__ inline uint32_t pack(float low, float high) {
    return kInput == MmaInput::kFloat16 ? pack_float16(low, high) : pack_bfloat16(low, high);
}

template <MmaInput kInput>
__device__ inline float unpack(uint16_t bits) {
    return kInput == MmaInput::kFloat16 ? float16_value(bits) : bfloat16_value(bits);
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
    using Part = uint2;
    static constexpr Element kElement = Element::kInt8;
    static constexpr MmaInput kInput = MmaInput::kFloat16;
    static constexpr int kRowTerms = 1;
    static constexpr int kQueryExponent = 15;

    // Byte i of four: 2^23 + (byte + 128) as a float needs no conversion instruction, and its difference is exact.
    static __device__ float byte_value(uint32_t offset_bytes, int i) {
        return __uint_as_float(0x4b000000u | (offset_bytes >> (8 * i) & 0xffu)) - (8388608.0f + 128.0f);
    }
    static __device__ void words(const Part& part, uint32_t (&out)[1][4]) {
        const uint32_t low = part.x ^ 0x80808080u, high = part.y ^ 0x80808080u;
        out[0][0] = pack_float16(byte_value(low, 0), byte_value(low, 1));
        out[0][1] = pack_float16(byte_value(low, 2), byte_value(low, 3));
        out[0][2] = pack_float16(byte_value(high, 0), byte_value(high, 1));
        out[0][3] = pack_float16(byte_value(high, 2), byte_value(high, 3));
    }
    static __device__ float value(Value element, float scale) { return static_cast<float>(element) * scale; }
};

template <class Format>
constexpr int kPartElements = slab_elements(Format::kElement) / 4;

// mma instructions for one product of a slab.
template <class Format>
constexpr int kSteps = slab_elements(Format::kElement) / 16;

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

// An upper bound of each row's norm; NaN for a row with an element that is not finite. Infinity for a norm above 2^64:
// the first pass's sums for that row may overflow on the way, and only an infinite bound keeps it.
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
    const bool finite = sum <= 1e100;  // 2048 squares of finite floats stay below
    if (t == 0 && row < s.rows.count) {
        const float norm = sum > 0x1p128 ? INFINITY : static_cast<float>(sqrt(sum) * (1 + 0x1p-20) + 0x1p-96);
        s.norms[row] = finite ? norm : NAN;
    }
}

}  // namespace valm
