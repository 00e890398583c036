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

template <class Format>
auto first_pass_of(const Plan& plan) {
    if (plan.streams_queries) {
        constexpr int kMany = many_streamed_tiles(Format::kElement);
        return plan.query_tiles == kMany ? first_pass_kernel<Format, kMany, true>
                                         : first_pass_kernel<Format, kFewStreamedTiles, true>;
    }
    return plan.query_tiles == 4   ? first_pass_kernel<Format, 4, false>
           : plan.query_tiles == 2 ? first_pass_kernel<Format, 2, false>
                                   : first_pass_kernel<Format, 1, false>;
}

// `search` has all members except its workspace.
inline void launch_search(Search search, void* workspace, Stream stream) {
    const Plan& plan = search.plan;
    char* const base = static_cast<char*>(workspace);
    search.packed = reinterpret_cast<uint4*>(base + plan.packed);
    search.errors = reinterpret_cast<float*>(base + plan.errors);
    search.exponents = reinterpret_cast<int*>(base + plan.exponents);
    search.thresholds = reinterpret_cast<uint64_t*>(base + plan.thresholds);
    search.candidates = reinterpret_cast<uint64_t*>(base + plan.candidates);
    search.redo = reinterpret_cast<int*>(base + plan.redo);

    const int padded_queries = plan.query_blocks * plan.query_tiles * 16;
    with_format(search.rows.element, [&](auto format) {
        using Format = decltype(format);
        launch(prepare_queries_kernel<Format>, dim3(blocks_for(padded_queries, kWarps)), kThreads, 0, stream, search);
        const dim3 grid(plan.query_blocks, plan.splits);
        if (plan.first_pass)
            launch(first_pass_of<Format>(plan), grid, kThreads, plan.first_pass_shared, stream, search);
        launch(merge_kernel<Format>, dim3(search.n_queries), kThreads, plan.merge_shared, stream, search);
        launch(exact_scan_kernel<Format>, dim3(plan.scan_blocks), kThreads, plan.scan_shared, stream, search);
    });
    const unsigned merge_blocks = std::min(search.n_queries, plan.scan_blocks);
    launch(exact_merge_kernel, dim3(merge_blocks), kThreads, plan.merge_shared, stream, search);
}

}  // namespace valm
