// The kernels in plain C++, for any processor.
#include <algorithm>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

// Four floats and loops that a compiler turns into whatever vectors there are.
struct Vector {
    static constexpr int kWidth = 4;
    float lane[kWidth];

    template <class Function>
    static Vector make(Function function) {
        Vector result;
        for (int i = 0; i < kWidth; ++i) result.lane[i] = function(i);
        return result;
    }
    static Vector all(float value) {
        return make([=](int) { return value; });
    }
    static Vector load(const float* p) {
        return make([=](int i) { return p[i]; });
    }
    static Vector load_half(const uint16_t* p) {
        return make([=](int i) { return half_to_float(p[i]); });
    }
    static Vector load_bfloat(const uint16_t* p) {
        return make([=](int i) { return bfloat_to_float(p[i]); });
    }
    static Vector load_byte(const int8_t* p) {
        return make([=](int i) { return static_cast<float>(p[i]); });
    }
    static Vector load_int(const int32_t* p) {
        return make([=](int i) { return static_cast<float>(p[i]); });
    }
    void store(float* p) const { memcpy(p, lane, sizeof lane); }
    friend Vector operator+(Vector a, Vector b) {
        return make([=](int i) { return a.lane[i] + b.lane[i]; });
    }
    friend Vector operator-(Vector a, Vector b) {
        return make([=](int i) { return a.lane[i] - b.lane[i]; });
    }
    friend Vector operator*(Vector a, Vector b) {
        return make([=](int i) { return a.lane[i] * b.lane[i]; });
    }
    static Vector fma(Vector a, Vector b, Vector c) {
        return make([=](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static Vector max(Vector a, Vector b) {
        return make([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // A bit for each lane where not a < b.
    static uint32_t not_below(Vector a, Vector b) {
        uint32_t mask = 0;
        for (int i = 0; i < kWidth; ++i) mask |= static_cast<uint32_t>(!(a.lane[i] < b.lane[i])) << i;
        return mask;
    }
    Vector abs() const {
        return make([this](int i) { return std::fabs(lane[i]); });
    }
    float largest() const { return std::fmax(std::fmax(lane[0], lane[1]), std::fmax(lane[2], lane[3])); }
    float sum() const { return (lane[0] + lane[1]) + (lane[2] + lane[3]); }
    Vector round_to_bytes(uint8_t* bytes) const {
        const Vector rounded = make([this](int i) { return std::nearbyint(lane[i]); });
        for (int i = 0; i < kWidth; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int>(rounded.lane[i]) + 128);
        return rounded;
    }
};

uint32_t pass(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    int32_t sums[kMaxTile][kPanelRows];
    for (int j = 0; j < tile.count; ++j) {
        std::fill_n(sums[j], kPanelRows, tile.start[j]);
        for (int64_t step = 0; step < steps; ++step) {
            const int16_t* g = static_cast<const int16_t*>(tile.codes) + (step * tile.count + j) * 4;
            const uint8_t* c = codes + step * kPanelRows * 4;
            for (int row = 0; row < kPanelRows; ++row) {  // g is stored in the order 0 2 1 3
                sums[j][row] +=
                    c[row * 4] * g[0] + c[row * 4 + 2] * g[1] + c[row * 4 + 1] * g[2] + c[row * 4 + 3] * g[3];
            }
        }
    }
    return keep<Vector>(sums, stats, tile, kept);
}

float score(const Rows& rows, int64_t index, const float* query) {
    float result = 0;
    with_row(rows, index, [&](auto row) { result = exact_score(query, row, rows.dim); });
    return result;
}

}  // namespace

const Kernels kGeneric = {"generic", false, kMaxTile, pass, pack_row<Vector>, dot<Vector>, score};

}  // namespace valm
