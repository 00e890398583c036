// Makes the first pass's copy of a database and finds its equal rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "huge_pages.hpp"
#include "topk/cpu/call.hpp"
#include "topk/cpu/first_pass.hpp"
#include "topk/cpu/row.hpp"

namespace valm {

namespace {

// The centre is the mean of every 64th row, within these limits. Any centre gives exact results.
constexpr int64_t kMinCentreRows = 64, kMaxCentreRows = 1024;

uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

uint64_t hash_row(const uint8_t* row, int64_t bytes) {
    uint64_t lanes[4] = {1, 2, 3, 4};  // four chains of products at once
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32) {
        uint64_t words[4];
        memcpy(words, row + i, sizeof words);
        for (int lane = 0; lane < 4; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
    }
    for (; i < bytes; ++i) lanes[0] = mix(lanes[0], row[i]);
    return mix(mix(lanes[0], lanes[1]), mix(lanes[2], lanes[3]));
}

}  // namespace

Element element_of(const std::string& dtype) {
    if (dtype == "float32") return Element::kFloat32;
    if (dtype == "float16") return Element::kFloat16;
    if (dtype == "bfloat16") return Element::kBFloat16;
    if (dtype == "int8") return Element::kInt8;
    throw std::invalid_argument("no stored rows of dtype " + dtype);
}

int64_t element_bytes(Element element) {
    switch (element) {
        case Element::kFloat32:
            return 4;
        case Element::kFloat16:
        case Element::kBFloat16:
            return 2;
        case Element::kInt8:
            return 1;
    }
    return 0;
}

bool row_is_finite(const Rows& rows, int64_t row) {
    bool finite = true;
    with_row(rows, row, [&](auto values) {
        for (int64_t e = 0; e < rows.dim; ++e) finite = finite && std::isfinite(values(e));
    });
    return finite;
}

void find_centre(const Rows& rows, float* centre, float* axis) {
    std::vector<double> sum(rows.dim);
    const int64_t wanted = std::clamp(rows.count / 64, kMinCentreRows, kMaxCentreRows);
    const int64_t taken = std::min(rows.count, wanted);
    for (int64_t i = 0; i < taken; ++i) {
        with_row(rows, i * rows.count / taken, [&](auto values) {
            for (int64_t e = 0; e < rows.dim; ++e) sum[e] += values(e);
        });
    }
    double square = 0;
    for (int64_t e = 0; e < rows.dim; ++e) {
        centre[e] = static_cast<float>(sum[e] / static_cast<double>(taken));
        if (!std::isfinite(centre[e])) centre[e] = 0;  // a row that is not finite is reported by pack
        square += static_cast<double>(centre[e]) * centre[e];
    }
    const double norm = std::sqrt(square);
    for (int64_t e = 0; e < rows.dim; ++e) axis[e] = norm > 0 ? static_cast<float>(centre[e] / norm) : 0;
}

int64_t find_duplicates(const Rows& rows, int threads, int32_t* row, int32_t* next_duplicate,
                        const std::function<bool()>& interrupted) {
    constexpr int64_t kRowsBetweenQuestions = 1024;
    Interruption interruption(interrupted);
    std::atomic<bool> stopped{false};
    const int64_t bytes = rows.dim * element_bytes(rows.element);
    const uint8_t* data = static_cast<const uint8_t*>(rows.data);
    const auto scale_bits = [&](int64_t i) {
        uint32_t bits = 0;
        if (rows.scale != nullptr) memcpy(&bits, rows.scale + i, sizeof bits);
        return bits;
    };
    std::vector<uint64_t> hashes(rows.count);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows.count; ++i) {
        if (stopped) continue;
        hashes[i] = mix(hash_row(data + i * bytes, bytes), scale_bits(i));
        if (i % kRowsBetweenQuestions == 0 && thread_number() == 0 && interruption.now()) stopped = true;
    }
    const auto equal = [&](int64_t a, int64_t b) {
        return hashes[a] == hashes[b] && scale_bits(a) == scale_bits(b) &&
               memcmp(data + a * bytes, data + b * bytes, bytes) == 0;
    };
    uint64_t slots = 1;
    while (slots < 2 * static_cast<uint64_t>(rows.count)) slots *= 2;
    std::vector<int32_t> table(slots, -1);  // first rows, open addressing
    std::vector<int32_t> last(rows.count);  // for a first row, the latest row equal to it
    int64_t different = 0;
    for (int32_t i = 0; i < rows.count && !stopped; ++i) {
        if (i % kRowsBetweenQuestions == 0 && interruption.now()) stopped = true;
        next_duplicate[i] = 0;
        uint64_t slot = hashes[i] & (slots - 1);
        while (table[slot] >= 0 && !equal(table[slot], i)) slot = (slot + 1) & (slots - 1);
        if (table[slot] < 0) {
            table[slot] = i;
            row[different++] = i;
        } else {
            next_duplicate[last[table[slot]]] = i;
        }
        last[table[slot]] = i;
    }
    return different;
}

int64_t pack(const Rows& rows, const PackedRows& packed, int64_t first_panel, const std::string& isa, int threads,
             const std::function<bool()>& interrupted) {
    const PlainArithmetic plain;
    Interruption interruption(interrupted);
    std::atomic<bool> stopped{false};
    const Kernels& kernels = topk_kernels(isa);
    if (first_panel == 0) find_centre(rows, packed.centre, packed.axis);
    const PaddedCentre padded(packed, rows.dim);
    const int64_t panels = (packed.count + kPanelRows - 1) / kPanelRows;
    use_huge_pages(packed.codes, panels * kPanelRows * ((rows.dim + 3) / 4 * 4));
    std::atomic<int64_t> broken{rows.count};
#pragma omp parallel num_threads(threads)
    {
        const PlainArithmetic plain_here;
#pragma omp for schedule(dynamic, 8)
        for (int64_t panel = first_panel; panel < panels; ++panel) {
            if (stopped) continue;
            const int64_t bad = pack_panel(kernels, rows, packed, padded, panel, panel);
            int64_t first = broken;
            while (bad >= 0 && bad < first && !broken.compare_exchange_weak(first, bad)) {
            }
            if (thread_number() == 0 && interruption.now()) stopped = true;
        }
    }
    return broken < rows.count ? broken.load() : -1;
}

PaddedCentre::PaddedCentre(const PackedRows& packed, int64_t dim) : centre((dim + 15) / 16 * 16), axis(centre.size()) {
    std::copy_n(packed.centre, dim, centre.begin());
    std::copy_n(packed.axis, dim, axis.begin());
}

int64_t pack_panel(const Kernels& kernels, const Rows& rows, const PackedRows& packed, const PaddedCentre& padded,
                   int64_t panel, int64_t place) {
    const int64_t steps = (rows.dim + 3) / 4;
    uint8_t* codes = packed.codes + place * steps * kPanelRows * 4;
    float* stats = packed.stats + place * kStats * kPanelRows;
    const int64_t begin = panel * kPanelRows;
    const int64_t count = std::min<int64_t>(kPanelRows, packed.count - begin);
    if (count < kPanelRows) {  // the padding of the last panel
        std::fill_n(codes, steps * kPanelRows * 4, uint8_t{128});
        std::fill_n(stats, kStats * kPanelRows, 0.0f);
    }
    int64_t bad = -1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = packed.row == nullptr ? begin + i : packed.row[begin + i];
        const bool finite =
            kernels.pack_row(rows, row, padded.centre.data(), padded.axis.data(), codes, stats, static_cast<int>(i));
        if (!finite && bad < 0 && !row_is_finite(rows, row)) bad = row;
    }
    return bad;
}

}  // namespace valm
