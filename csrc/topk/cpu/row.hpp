// Reads one stored row of any type as float32. Local to the including file, like simd/vector.hpp.
#pragma once

#include "topk/cpu/vectors.hpp"
#include "topk/topk.hpp"

namespace valm {
namespace {

// One row, read as float32: by whole vectors, and element by element at the end.
template <Element kElement>
struct Row;

template <>
struct Row<Element::kFloat32> {
    const float* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const float*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return data[e]; }
    FloatVector vector(int64_t e) const { return load_vector<FloatVector>(data + e); }
};

template <>
struct Row<Element::kFloat16> {
    const uint16_t* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const uint16_t*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return half_to_float(data[e]); }
    FloatVector vector(int64_t e) const { return widen_float16(load_vector<HalfBitsVector>(data + e)); }
};

template <>
struct Row<Element::kBFloat16> {
    const uint16_t* data;
    Row(const Rows& rows, int64_t row) : data(static_cast<const uint16_t*>(rows.data) + row * rows.dim) {}
    float operator()(int64_t e) const { return bfloat_to_float(data[e]); }
    FloatVector vector(int64_t e) const { return widen_bfloat16(load_vector<HalfBitsVector>(data + e)); }
};

template <>
struct Row<Element::kInt8> {
    const int8_t* data;
    float scale;
    Row(const Rows& rows, int64_t row)
        : data(static_cast<const int8_t*>(rows.data) + row * rows.dim), scale(rows.scale[row]) {}
    float operator()(int64_t e) const { return static_cast<float>(data[e]) * scale; }
    FloatVector vector(int64_t e) const { return to_float(load_vector<ByteVector>(data + e)) * scale; }
};

// Prefetches the bytes kPrefetchBytes after element e of a row, in the rows that follow: the processor itself looks
// ahead only to the end of a page. Harmless beyond the last row.
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

}  // namespace
}  // namespace valm
