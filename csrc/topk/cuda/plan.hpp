// Divides a search on a CUDA device into blocks and lays out its workspace. Plain C++, no GPU needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "topk/topk.hpp"

namespace valm {

struct DeviceLimits {
    int multiprocessors;
    int64_t shared_per_block;           // bytes a block may ask for
    int64_t shared_per_multiprocessor;  // bytes
};

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Rows of a warp in the first pass: 4 mma tiles of 8.
constexpr int kRowTiles = 4;
constexpr int kBlockRows = kWarps * kRowTiles * 8;
// Slabs of a tile that are in flight to shared memory at once. An H100 needs 20 KB in flight in each multiprocessor
// (3.35 TB/s, 132 multiprocessors, 0.8 us); a slab of a tile is kStageBytes, 16 KB.
constexpr int kMostStages = 4;
constexpr int64_t kStageBytes = int64_t{kThreads} * kRowTiles * 16;
// The exact scan: 4 lanes read a row, kScanSlab elements at once, for up to kMostScanQueries queries.
constexpr int kScanSlab = 32;
constexpr int kMostScanQueries = 4;
constexpr int kScanRows = kWarps * 8;
// The largest k of the first pass: larger pools do not fit into shared memory next to the queries. For a larger k only
// the exact scan runs.
constexpr int kFirstPassBest = 128;
// The largest pool of a first pass or a merge, and the number of its keys that are kept.
constexpr int kMostCapacity = 256;
constexpr int kMostKept = 192;

// The fewest tiles of 16 queries in a block whose queries stay in device memory: their largest pools fit with 2 slabs
// of rows into 99 KiB, the least of any GPU since compute capability 8.0.
constexpr int kFewStreamedTiles = 2;

// Bytes of shared memory that CUDA takes for itself with every block.
constexpr int64_t kReservedShared = 1024;

struct Plan {
    int slabs;        // of a row
    int query_tiles;  // of 16 queries in a block of the first pass: 4, 2 or 1 in shared memory, 8, 4 or 2 if streamed
    // The first pass reads the queries from device memory, because a block then takes more of them: each block reads
    // its part of the rows. The warps of a block find a slab of queries in the first-level cache.
    bool streams_queries;
    int stages;        // slabs of rows in the shared memory of the first pass
    int query_blocks;  // blocks that share a part of the database
    int splits;        // parts of the database
    int kept;          // candidates that a part passes on for each query
    int capacity;      // of a pool, a power of two
    int scan_blocks;   // blocks of the exact scan
    int scan_queries;  // queries of such a block
    int64_t lists;     // candidate lists in the workspace
    bool first_pass;   // false: the pools do not fit into shared memory, and the exact scan serves all queries
    int64_t first_pass_shared, merge_shared, scan_shared;  // bytes
    // Workspace: offsets and size in bytes.
    int64_t packed, errors, exponents, thresholds, candidates, redo, bytes;
};

// Blocks of the first pass that share a multiprocessor, limited by their registers.
constexpr int first_pass_residents(int query_tiles) { return query_tiles == 1 ? 2 : 1; }

// Terms for one number of a query: 16-bit numbers, or for int8 rows digits of 8 bits. One float16 is close enough. One
// bfloat16 is not: it left 13 of 16 queries without proof at k = 16, for 20,000 unit rows of 768 elements with a mean
// cosine of 0.8.
constexpr int query_terms(Element element) { return element == Element::kFloat16 ? 1 : 2; }

// The most tiles of such a block: more sums than these do not fit into the registers of a warp.
constexpr int many_streamed_tiles(Element element) { return query_terms(element) == 1 ? 8 : 4; }

// Bytes of all terms.
constexpr int query_element_bytes(Element element) {
    return query_terms(element) * (element == Element::kInt8 ? 1 : 2);
}

// Elements of a row that a warp multiplies at once: 4 lanes take 16 bytes each.
constexpr int slab_elements(Element element) {
    return element == Element::kFloat32 ? 16 : element == Element::kInt8 ? 64 : 32;
}

inline int64_t pool_bytes(int queries, int capacity) { return int64_t{queries} * (capacity * 8 + 12); }

inline Plan make_plan(int64_t n_queries, const Rows& rows, int k, const DeviceLimits& limits) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    Plan plan{};
    plan.slabs = static_cast<int>(ceil_div(rows.dim, slab_elements(rows.element)));
    plan.capacity = k <= 16 ? 64 : k <= 64 ? 128 : k <= kFirstPassBest ? kMostCapacity : 2048;
    plan.kept = k <= 16 ? 32 : k <= 64 ? 96 : k <= kFirstPassBest ? kMostKept : 1536;

    const int64_t query_bytes =  // of 16 queries
        int64_t{16} * plan.slabs * slab_elements(rows.element) * query_element_bytes(rows.element);
    const auto first_pass_shared = [&](int tiles, bool streams, int stages) {
        // the packed queries, their error factors, their pools, the rows
        return (streams ? 0 : tiles * query_bytes) + 16 * tiles * 4 + pool_bytes(16 * tiles, plan.capacity) +
               stages * kStageBytes;
    };
    // with fewer than 2 stages a block waits for every slab
    const auto has_room = [&](int tiles, bool streams) {
        return first_pass_shared(tiles, streams, 2) <= limits.shared_per_block;
    };
    plan.query_tiles = n_queries > 32 ? 4 : n_queries > 16 ? 2 : 1;
    while (plan.query_tiles > 0 && !has_room(plan.query_tiles, false)) plan.query_tiles /= 2;
    const int many_tiles = many_streamed_tiles(rows.element);
    const bool fills_many = n_queries > 16 * many_tiles / 2;
    const int streamed_tiles = fills_many && has_room(many_tiles, true) ? many_tiles : kFewStreamedTiles;
    const bool takes_more = std::min<int64_t>(n_queries, 16 * streamed_tiles) > 16 * plan.query_tiles;
    plan.streams_queries = takes_more && (plan.query_tiles == 0 || has_room(streamed_tiles, true));
    if (plan.streams_queries) plan.query_tiles = streamed_tiles;
    const auto bytes = [&](int stages) { return first_pass_shared(plan.query_tiles, plan.streams_queries, stages); };
    int residents = first_pass_residents(plan.query_tiles);
    const auto fits = [&](int stages) {
        const int64_t share = limits.shared_per_multiprocessor / residents - kReservedShared;
        return bytes(stages) <= std::min(limits.shared_per_block, share);
    };
    if (!fits(2)) residents = 1;
    plan.stages = kMostStages;
    while (plan.stages > 1 && !fits(plan.stages)) --plan.stages;
    plan.first_pass_shared = bytes(plan.stages);
    plan.first_pass = k <= kFirstPassBest && plan.first_pass_shared <= limits.shared_per_block;
    plan.query_blocks = static_cast<int>(ceil_div(n_queries, 16 * plan.query_tiles));

    // The number of parts with the shortest critical path: waves of blocks times row tiles of a block.
    const int64_t resident = int64_t{limits.multiprocessors} * residents;
    const int64_t row_tiles = ceil_div(rows.count, kBlockRows);
    const int64_t most_splits =
        plan.first_pass ? std::min(row_tiles, std::max<int64_t>(1, 4 * resident / plan.query_blocks)) : 1;
    int64_t best = INT64_MAX;
    for (int64_t splits = 1; splits <= most_splits; ++splits) {
        const int64_t way = ceil_div(plan.query_blocks * splits, resident) * ceil_div(row_tiles, splits);
        if (way < best) {
            best = way;
            plan.splits = static_cast<int>(splits);
        }
    }
    plan.scan_blocks = static_cast<int>(std::min<int64_t>(limits.multiprocessors, ceil_div(rows.count, kScanRows)));
    // With 99 KiB a block this is 3 for queries of more than 1,104 numbers, if k is above kFirstPassBest.
    plan.scan_queries = kMostScanQueries;
    const auto scan_shared = [&] {
        return pool_bytes(plan.scan_queries, plan.capacity) + plan.scan_queries * rows.dim * 8;
    };
    while (plan.scan_queries > 1 && scan_shared() > limits.shared_per_block) --plan.scan_queries;
    plan.scan_shared = scan_shared();
    plan.lists =
        plan.scan_queries * std::max(ceil_div(n_queries, plan.scan_queries) * plan.splits, int64_t{plan.scan_blocks});
    plan.merge_shared = pool_bytes(1, std::max(plan.capacity, kMostCapacity));

    const int64_t padded_queries = int64_t{plan.query_blocks} * plan.query_tiles * 16;
    int64_t at = 0;
    const auto place = [&](int64_t bytes) {
        const int64_t offset = at;
        at += ceil_div(bytes, 256) * 256;
        return offset;
    };
    plan.packed = place(padded_queries / 16 * query_bytes);
    plan.errors = place(padded_queries * 4);
    plan.exponents = place(padded_queries * 4);
    plan.thresholds = place(padded_queries * 8);
    plan.candidates = place(plan.lists * plan.kept * 8);
    plan.redo = place((n_queries + 1) * 4);
    plan.bytes = at;
    return plan;
}

}  // namespace valm
