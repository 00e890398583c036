// The exact scan: a search by only exact scores, for queries whose result the first pass could not prove. Its kernels
// are launched with every search, and return at once if the redo list is empty.
#pragma once

#include "topk/cuda/kernel.cuh"

namespace valm {

// The queries of the redo list are scanned in groups of scan_queries. Blocks and candidate lists limit the number of
// parts of the database.
__device__ inline int scan_groups(const Search& s) { return (*s.redo + s.plan.scan_queries - 1) / s.plan.scan_queries; }

__device__ inline int scan_splits(const Search& s, int groups) {
    const int64_t by_lists = s.plan.lists / (static_cast<int64_t>(groups) * s.plan.scan_queries);
    return static_cast<int>(min(by_lists, static_cast<int64_t>(s.plan.scan_blocks)));
}

template <class Format>
__global__ __launch_bounds__(kThreads, 1) void exact_scan_kernel(Search s) {
    const int groups = scan_groups(s);
    if (groups == 0) return;
    const int splits = scan_splits(s, groups);
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;

    // shared: queries (n, elements), pools
    const int n = s.plan.scan_queries;
    double* const queries = reinterpret_cast<double*>(dynamic_shared());
    const int dim = static_cast<int>(s.rows.dim);
    const Pools pools(queries + n * dim, n, s.plan.capacity, s.plan.kept);

    for (int64_t item = blockIdx.x; item < static_cast<int64_t>(groups) * splits; item += gridDim.x) {
        const int group = item % groups, split = item / groups;
        for (int i = thread; i < n * dim; i += kThreads) {
            const int slot = group * n + i / dim, e = i % dim;
            queries[i] = slot < s.redo[0] ? s.queries[static_cast<int64_t>(s.redo[1 + slot]) * s.rows.dim + e] : 0.0;
        }
        if (thread < n) {
            pools.reset(thread, group * n + thread < s.redo[0] ? 0 : closed_threshold());
        }
        __syncthreads();

        for (int64_t tile = static_cast<int64_t>(split) * kScanRows; tile < s.rows.count;
             tile += static_cast<int64_t>(splits) * kScanRows) {
            const int64_t row = tile + warp * 8 + g, there = min(row, s.rows.count - 1);
            const auto* elements = row_at<Format>(s.rows, there);
            const float scale = scale_at<Format>(s.rows, there);
            // Lane t of a row's four holds partial sums 8 t to 8 t + 7 of exact.hpp.
            double sums[kMostScanQueries][8] = {};
            for (int first = 8 * t; first < dim; first += kScanSlab) {
                float values[8];
                load_values<Format>(elements, scale, first, values);
#pragma unroll
                for (int q = 0; q < kMostScanQueries; ++q) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        sums[q][j] += queries[min(q, n - 1) * dim + first + j] * static_cast<double>(values[j]);
                    }
                }
            }
            double sum = 0;  // of query t, if there is one
#pragma unroll
            for (int q = 0; q < kMostScanQueries; ++q) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    sums[q][j] += shuffle_xor(sums[q][j], 2);  // partial sum l + 16
                    sums[q][j] += shuffle_xor(sums[q][j], 1);  // l + 8
                }
#pragma unroll
                for (int step = 4; step > 0; step /= 2) {
#pragma unroll
                    for (int j = 0; j < step; ++j) sums[q][j] += sums[q][j + step];
                }
                if (q == t) sum = sums[q][0];
            }
            bool pending = t < n && row < s.rows.count && s.row_norms[there] == s.row_norms[there];
            const uint64_t key = candidate_key(exact_round(sum), static_cast<uint32_t>(row));
            // t by value: by reference, the compiler would move sums to local memory
            pools.take([&, t] { return pending = pending && !pools.offer(t, key); }, [](int) {});
        }

        if (warp < n) {
            pools.flush(warp, lane);
            const int64_t list = static_cast<int64_t>(group * n + warp) * splits + split;
            for (int i = lane; i < s.plan.kept; i += kWarp) {
                s.candidates[list * s.plan.kept + i] = pools.query_keys(warp)[i];
            }
        }
        __syncthreads();
    }
}

static __global__ __launch_bounds__(kThreads) void exact_merge_kernel(Search s) {
    const int groups = scan_groups(s);
    if (groups == 0) return;
    const int64_t keys_of_query = static_cast<int64_t>(scan_splits(s, groups)) * s.plan.kept;
    const Pools pools(dynamic_shared(), 1, s.plan.capacity, s.plan.kept);
    for (int slot = blockIdx.x; slot < s.redo[0]; slot += gridDim.x) {
        select_best(pools, s.candidates + slot * keys_of_query, keys_of_query, 0);
        write_answer(s, s.redo[1 + slot], pools.keys);
    }
}

}  // namespace valm
