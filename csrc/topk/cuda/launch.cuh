// The kernels of a search in the order of their launch.
#pragma once

#include "topk/cuda/scan.cuh"

namespace valm {

// Calls function(Format{}) with the format of the rows.
template <class Function>
void with_format(Element element, Function function) {
    switch (element) {
        case Element::kFloat32:
            return function(Float32Rows{});
        case Element::kFloat16:
            return function(Float16Rows{});
        case Element::kBFloat16:
            return function(BFloat16Rows{});
        case Element::kInt8:
            return function(Int8Rows{});
    }
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
    return static_cast<unsigned>((items + items_per_block - 1) / items_per_block);
}

inline void launch_row_norms(const RowNorms& norms, Stream stream) {
    with_format(norms.rows.element, [&](auto format) {
        using Format = decltype(format);
        launch(row_norms_kernel<Format>, dim3(blocks_for(norms.rows.count, kThreads / 4)), kThreads, 0, stream, norms);
    });
}

template <class Format, bool kFindsNorms>
void launch_first_pass(const Search& search, Stream stream) {
    const Plan& plan = search.plan;
    if (plan.sample_tiles) {
        const auto sample = plan.streams_queries    ? sample_kernel<Format, kStreamedQueryTiles, kFindsNorms, true>
                            : plan.query_tiles == 4 ? sample_kernel<Format, 4, kFindsNorms, false>
                                                    : sample_kernel<Format, 2, kFindsNorms, false>;
        const dim3 grid(plan.query_blocks, plan.sample_tiles);
        launch(sample, grid, kThreads, plan.first_pass_shared, stream, search);
        launch(sample_thresholds_kernel, dim3(blocks_for(search.n_queries, kWarps)), kThreads,
               kWarps * kSampleKeys * sizeof(uint64_t), stream, search);
    }
    const auto first_pass = plan.streams_queries    ? first_pass_kernel<Format, kStreamedQueryTiles, kFindsNorms, true>
                            : plan.query_tiles == 4 ? first_pass_kernel<Format, 4, kFindsNorms, false>
                            : plan.query_tiles == 2 ? first_pass_kernel<Format, 2, kFindsNorms, false>
                                                    : first_pass_kernel<Format, 1, kFindsNorms, false>;
    launch(first_pass, dim3(plan.query_blocks, plan.splits), kThreads, plan.first_pass_shared, stream, search);
}

// `search` with all but its workspace filled in.
inline void launch_search(Search search, void* workspace, Stream stream) {
    const Plan& plan = search.plan;
    char* const base = static_cast<char*>(workspace);
    search.packed = reinterpret_cast<uint4*>(base + plan.packed);
    search.errors = reinterpret_cast<float*>(base + plan.errors);
    search.exponents = reinterpret_cast<int*>(base + plan.exponents);
    search.thresholds = reinterpret_cast<uint64_t*>(base + plan.thresholds);
    search.sample = reinterpret_cast<uint64_t*>(base + plan.sample);
    search.candidates = reinterpret_cast<uint64_t*>(base + plan.candidates);
    search.redo = reinterpret_cast<int*>(base + plan.redo);

    const int padded_queries = plan.query_blocks * plan.query_tiles * 16;
    // Int8 rows without norms are those that are streamed from the host, which takes longer than a second reading.
    const bool in_first_pass = search.finds_norms && plan.first_pass && plan.query_blocks <= kMostNormBlocks &&
                               search.rows.element != Element::kInt8;
    if (search.finds_norms && !in_first_pass) launch_row_norms({search.rows, search.row_norms}, stream);
    with_format(search.rows.element, [&](auto format) {
        using Format = decltype(format);
        launch(prepare_queries_kernel<Format>, dim3(blocks_for(padded_queries, kWarps)), kThreads, 0, stream, search);
        if constexpr (Format::kElement != Element::kInt8) {
            if (in_first_pass) launch_first_pass<Format, true>(search, stream);
        }
        if (plan.first_pass && !in_first_pass) launch_first_pass<Format, false>(search, stream);
        launch(merge_kernel<Format>, dim3(search.n_queries), kThreads, plan.merge_shared, stream, search);
        launch(exact_scan_kernel<Format>, dim3(plan.scan_blocks), kThreads, plan.scan_shared, stream, search);
    });
    const unsigned merge_blocks = std::min(search.n_queries, plan.scan_blocks);
    launch(exact_merge_kernel, dim3(merge_blocks), kThreads, plan.merge_shared, stream, search);
}

}  // namespace valm
