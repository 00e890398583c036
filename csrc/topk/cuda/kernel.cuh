// Exact top-K inner product on a CUDA device.
//
// First pass: tensor cores multiply queries of 16-bit numbers, or of two digits of 8 bits for int8 rows, by the
// database. For query q (times a power of two) and row x the sum s they return satisfies
// |s - q.x| <= error(q) norm(x), so u = s + error(q) norm(x) is never below the score, and the pass keeps the rows with
// the best (u falling, index rising). Then the kept rows are scored exactly (exact.hpp). The result is proven if the
// k-th exact score is above the u of the last kept row, which bounds every row that was dropped. Without this proof,
// more of a query's candidates are scored exactly. If that is not enough, the query goes to a list, and a scan of the
// whole database computes its result from exact scores. Nothing waits for the host.
//
// The parts of error(q), for E elements and |.| the Euclidean norm, by the Cauchy-Schwarz inequality:
//   |q - q16|                             q16 is the query for the tensor cores, measured for each query
//   |q16| 2^-18 for each mma              sums in float32: products are exact; an mma adds 16 of them and the sum so
//                                         far, each cut after 23 bits below the largest, in at most 4 steps, so it
//                                         loses at most (16 + 4 + 4) 2^-23 of the sum of magnitudes; 2^-18 is 32 of
//                                         these. NVIDIA does not document this: Fasi, Higham, Mikaitis and Pranesh
//                                         measured it (Numerical behavior of NVIDIA tensor cores, 2021). The sums of
//                                         int8 rows lose nothing: they are integers of at most E 2^14 <= 2^25
//   |q16| 2^-16                           float32 rows only: x16 = high + low bfloat16, low x low left out
//   |q16| 2^-20                           rounding, each time by 2^-24 at most, of u, of the float64 score, and of int8
//                                         rows: of an element times its scale, and of s = (256 high.x + low.x) scale,
//                                         where both products are rounded, then their sum, then s. The products are
//                                         at most 2 |q16| |x| and |q16| |x|, because |low| <= 128 sqrt(E) < 2^13 <=
//                                         |q16|. Together 2^-21 at most
// norm(x) includes 2^-96 for bfloat16 products that underflow, and is infinite above 2^64. Below that no sum overflows;
// above it u is infinite or NaN, which counts as infinite, so the row is kept.
#pragma once

#include "topk/cuda/formats.cuh"
#include "topk/cuda/select.cuh"

namespace valm {

// The arguments of all kernels, passed by value.
struct Search {
    const float* queries;    // (n_queries, rows.dim)
    Rows rows;               // rows.dim a multiple of 16, so that 16 bytes load at once
    const float* row_norms;  // (rows.count), from row_norms_kernel; NaN: never return this row
    int n_queries, k;
    Plan plan;
    // Workspace, in the order of Plan's offsets.
    uint4* packed;         // (padded queries / 16, terms, steps of 16 elements, lanes): `a` of an mma
    float* errors;         // (padded queries): error(q), NaN for a query that is not finite
    int* exponents;        // (padded queries): the first pass works on 2^exponent q
    uint64_t* thresholds;  // (padded queries): the best key with at least `kept` candidates at or above it
    uint64_t* candidates;  // (lists, kept)
    int* redo;             // the number of queries that need the exact scan, then their numbers
    float* scores;         // (n_queries, k)
    int64_t* indices;      // (n_queries, k)
};

template <class Format>
constexpr int kQueryTerms = query_terms(Format::kElement);

// The number of terms of a row that multiply a term of a query: all except low x low.
template <class Format>
__host__ __device__ constexpr int row_terms(int query_term) {
    return query_term == 0 ? Format::kRowTerms : 1;
}

// mma instructions for one step of a slab.
template <class Format>
constexpr int kProducts = Format::kRowTerms + (kQueryTerms<Format> - 1);

// Sums of a query and a row: one for all terms of the query, or one for each digit.
template <class Format>
constexpr int kSums = Format::kInput == MmaInput::kInt8 ? kQueryTerms<Format> : 1;
template <class Format, int kQueryTiles>
using Sums = MmaSum<Format::kInput>[kSums<Format>][kQueryTiles][kRowTiles][4];

// --- queries -----------------------------------------------------------------------------------------------------

// One warp for each query: its scale, its error factor, and its words as the mma's lanes take them.
template <class Format>
__global__ __launch_bounds__(kThreads) void prepare_queries_kernel(Search s) {
    const int lane = threadIdx.x % kWarp;
    const int query = blockIdx.x * kWarps + threadIdx.x / kWarp;
    const int padded_queries = s.plan.query_blocks * s.plan.query_tiles * 16;
    if (query == 0 && lane == 0) s.redo[0] = 0;
    if (query >= padded_queries) return;

    const bool there = query < s.n_queries;
    const float* const elements = s.queries + static_cast<int64_t>(there ? query : 0) * s.rows.dim;
    float largest = 0;
    bool not_finite = false;
    for (int e = lane; there && e < s.rows.dim; e += kWarp) {
        const float magnitude = fabsf(elements[e]);
        not_finite |= !(magnitude <= 3.402823466e+38f);
        largest = fmaxf(largest, magnitude);
    }
    not_finite = any_in_warp(not_finite);
    for (int mask = kWarp / 2; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    int exponent = 0;
    if (largest > 0 && !not_finite) {
        frexpf(largest, &exponent);
        exponent = Format::kQueryExponent - exponent;
    }

    double square = 0, lost_square = 0;  // of the scaled query, and of the part that its words leave out
    const int half = query / 8 % 2, g = query % 8;
    const int64_t steps = static_cast<int64_t>(s.plan.slabs) * kSteps<Format>;
    uint4* const packed = s.packed + query / 16 * kQueryTerms<Format> * steps * kWarp;
    for (int part = lane; part < s.plan.slabs * 4; part += kWarp) {
        const int slab = part / 4, t = part % 4;
        double rest[kPartElements<Format>];
#pragma unroll
        for (int j = 0; j < kPartElements<Format>; ++j) {
            const int e = part * kPartElements<Format> + j;
            rest[j] = there && !not_finite && e < s.rows.dim ? ldexp(static_cast<double>(elements[e]), exponent) : 0.0;
            square += rest[j] * rest[j];
        }
#pragma unroll
        for (int term = 0; term < kQueryTerms<Format>; ++term) {
#pragma unroll
            for (int i = 0; i < kPartWords<Format>; ++i) {
                const uint32_t word = take_term<Format::kInput>(term, rest + i * kWordValues<Format>);
                uint4& fragment = packed[(term * steps + slab * kSteps<Format> + i / 2) * kWarp + g * 4 + t];
                reinterpret_cast<uint32_t*>(&fragment)[i % 2 * 2 + half] = word;
            }
        }
#pragma unroll
        for (int j = 0; j < kPartElements<Format>; ++j) lost_square += rest[j] * rest[j];
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        square += shuffle_xor(square, mask);
        lost_square += shuffle_xor(lost_square, mask);
    }
    if (lane != 0) return;
    const double lost = sqrt(lost_square), norm16 = sqrt(square) + lost;
    const int mmas = Format::kInput == MmaInput::kInt8 ? 0 : static_cast<int>(steps) * kProducts<Format>;
    const double relative = mmas * 0x1p-18 + (Format::kRowTerms == 2 ? 0x1p-16 : 0.0) + 0x1p-20;
    s.errors[query] = not_finite ? NAN : static_cast<float>((lost + norm16 * relative) * (1 + 0x1p-20));
    s.exponents[query] = exponent;
    s.thresholds[query] = 0;
}

// --- first pass --------------------------------------------------------------------------------------------------

// The rows of a lane on their way from device memory, tile after tile, one slab in each stage. A lane copies only what
// it multiplies, so no other lane waits for it. If the copies went through registers, the compiler would put the loads
// of a slab after the products that should hide them.
template <class Format>
struct RowStream {
    using Part = typename Format::Part;
    static constexpr int kWarpParts = kRowTiles * kWarp;
    static constexpr int kStageParts = kWarps * kWarpParts;

    const Search& s;
    Part* const parts;  // of this lane: (stages, kWarps, kRowTiles, kWarp) in the block's order
    int64_t first_row;  // of this lane in the tile whose slabs are copied next
    const int t;
    const typename Format::Value* row[kRowTiles];
    int slab = 0;   // to be copied next
    int stage = 0;  // of the oldest slab

    // Starts the copies of the first slabs.
    __device__ RowStream(const Search& s, Part* stages, int64_t warp_row)
        : s(s),
          parts(stages + threadIdx.x / kWarp * kWarpParts + threadIdx.x % kWarp),
          first_row(warp_row + threadIdx.x % kWarp / 4),
          t(threadIdx.x % 4) {
        find_rows();
        for (int i = 0; i < s.plan.stages; ++i) replace();
    }

    __device__ void find_rows() {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            row[i] = row_at<Format>(s.rows, min(first_row + 8 * i, s.rows.count - 1));
        }
    }

    // The oldest slab, as parts at a distance of kWarp.
    __device__ Part* oldest() const { return parts + stage * kStageParts; }

    __device__ const Part* wait() const {
        wait_copies(s.plan.stages - 1);
        return oldest();
    }

    // Starts the copy of the next slab in place of the oldest.
    __device__ void replace() {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            const int e = (4 * slab + t) * kPartElements<Format>;
            copy_async(oldest() + i * kWarp, row[i] + e, e < s.rows.dim);
        }
        commit_copies();
        if (++stage == s.plan.stages) stage = 0;
        if (++slab == s.plan.slabs) {
            slab = 0;
            first_row += static_cast<int64_t>(s.plan.splits) * kBlockRows;
            find_rows();
        }
    }
};

// sums += queries (16 kQueryTiles) x rows (8 kRowTiles) over one slab, whose rows are laid out as in RowStream.
template <class Format, int kQueryTiles>
__device__ inline void multiply(const uint4* packed, int slab, int slabs, int lane, const typename Format::Part* rows,
                                Sums<Format, kQueryTiles>& sums) {
    uint4 query[kQueryTiles][kQueryTerms<Format>][kSteps<Format>];
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
        for (int term = 0; term < kQueryTerms<Format>; ++term) {
#pragma unroll
            for (int step = 0; step < kSteps<Format>; ++step) {
                const int at = ((m * kQueryTerms<Format> + term) * slabs + slab) * kSteps<Format> + step;
                query[m][term][step] = packed[at * kWarp + lane];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
        uint32_t row[Format::kRowTerms][kPartWords<Format>];
        Format::words(rows[n * kWarp], row);
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
            for (int query_term = 0; query_term < kQueryTerms<Format>; ++query_term) {
#pragma unroll
                for (int row_term = 0; row_term < row_terms<Format>(query_term); ++row_term) {
#pragma unroll
                    for (int step = 0; step < kSteps<Format>; ++step) {
                        const uint4 q = query[m][query_term][step];
                        const uint32_t a[4] = {q.x, q.y, q.z, q.w};
                        const uint32_t* const b = row[row_term] + 2 * step;
                        mma<Format::kInput>(sums[query_term % kSums<Format>][m][n], a, b[0], b[1]);
                    }
                }
            }
        }
    }
}

// The queries of a block.
struct BlockQueries {
    const uint4* words;  // (tiles, terms, steps of 16 elements, lanes), in shared or, if streamed, in device memory
    float* errors;       // factors, in shared memory, which is free after them
};

// Copies the block's queries to shared memory; for streamed queries, only the error factors. Called by the whole block,
// before a barrier.
template <class Format, int kQueryTiles, bool kStreamed>
__device__ inline BlockQueries load_queries(const Search& s) {
    constexpr int kQueries = 16 * kQueryTiles;
    const int thread = threadIdx.x;
    const int chunks = kQueryTiles * kQueryTerms<Format> * s.plan.slabs * kSteps<Format> * kWarp;
    const uint4* const source = s.packed + static_cast<int64_t>(blockIdx.x) * chunks;
    uint4* const shared = dynamic_shared();
    if constexpr (!kStreamed) {
        for (int i = thread; i < chunks; i += kThreads) shared[i] = source[i];
    }
    float* const errors = reinterpret_cast<float*>(shared + (kStreamed ? 0 : chunks));
    if (thread < kQueries) {
        const float error = s.errors[blockIdx.x * kQueries + thread];
        errors[thread] = error == error ? error : 0.0f;
    }
    return {kStreamed ? source : shared, errors};
}

// A warp's 32 rows of a tile, and the queries of its block.
template <int kQueryTiles>
struct Tile {
    float bounds[kQueryTiles][kRowTiles][4];  // u: [..][..][2 h + j]: query g + 8 h, row 2 t + j
    float norms[kRowTiles][2];                // NaN for a row that must not be returned
};

// The tile of the warp's rows from warp_row on, the next of the stream.
template <class Format, int kQueryTiles>
__device__ inline void find_bounds(const Search& s, const BlockQueries& queries, RowStream<Format>& stream,
                                   int64_t warp_row, Tile<kQueryTiles>& tile) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const auto row_of = [&](int n, int j) { return warp_row + 8 * n + 2 * t + j; };
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int64_t row = row_of(n, j);
            tile.norms[n][j] = row < s.rows.count ? s.row_norms[row] : NAN;
        }
    }
    Sums<Format, kQueryTiles> sums = {};
    for (int slab = 0; slab < s.plan.slabs; ++slab) {
        const auto* const rows = stream.wait();
        multiply<Format, kQueryTiles>(queries.words, slab, s.plan.slabs, lane, rows, sums);
        stream.replace();
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            [[maybe_unused]] const float scale = scale_at<Format>(s.rows, min(row_of(n, j), s.rows.count - 1));
#pragma unroll
            for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float error = queries.errors[16 * m + 8 * h + g];
                    float sum = static_cast<float>(sums[0][m][n][2 * h + j]);
                    if constexpr (kSums<Format> == 2) {
                        sum = fmaf(kDigitBase, sum, static_cast<float>(sums[1][m][n][2 * h + j])) * scale;
                    }
                    tile.bounds[m][n][2 * h + j] = fmaf(error, tile.norms[n][j], sum);
                }
            }
        }
    }
}

// The key of a row by its upper bound; a bound of NaN counts as infinite.
__device__ inline uint64_t bound_key(float bound, int64_t row) {
    return candidate_key(bound == bound ? bound : INFINITY, static_cast<uint32_t>(row));
}

// A block takes 16 kQueryTiles queries and every splits-th tile of 256 rows. With this stride, blocks of different
// queries that run together read the same rows, and sorted databases spread over all blocks.
template <class Format, int kQueryTiles, bool kStreamsQueries>
__global__ __launch_bounds__(kThreads, first_pass_residents(kQueryTiles)) void first_pass_kernel(Search s) {
    constexpr int kQueries = 16 * kQueryTiles;
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
    const int first_query = blockIdx.x * kQueries;
    const int split = blockIdx.y;

    const BlockQueries queries = load_queries<Format, kQueryTiles, kStreamsQueries>(s);
    auto* const stages = reinterpret_cast<typename Format::Part*>(queries.errors + kQueries);
    const Pools pools(stages + s.plan.stages * RowStream<Format>::kStageParts, kQueries, s.plan.capacity, s.plan.kept);
    if (thread < kQueries) {
        const int query = first_query + thread;
        const bool open = query < s.n_queries && s.errors[query] == s.errors[query];
        pools.reset(thread, open ? s.thresholds[query] : closed_threshold());
    }
    __syncthreads();

    // Publishes the last kept key of this part of the database, and takes over the best key of the other parts: no
    // lower key can be among the best of the whole.
    const auto share_threshold = [&](int query) {
        uint64_t& threshold = pools.thresholds[query];
        threshold = max(threshold, atomic_max(s.thresholds + first_query + query, threshold));
    };

    const int64_t warp_row = static_cast<int64_t>(split) * kBlockRows + warp * (kRowTiles * 8);
    RowStream<Format> stream(s, stages, warp_row);
    for (int64_t row = warp_row; row - warp * (kRowTiles * 8) < s.rows.count;
         row += static_cast<int64_t>(s.plan.splits) * kBlockRows) {
        Tile<kQueryTiles> tile;
        find_bounds<Format, kQueryTiles>(s, queries, stream, row, tile);

        // A bit for each bound that may pass the threshold.
        uint32_t pending[kQueryTiles];
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
            pending[m] = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float threshold = key_score(pools.thresholds[16 * m + 8 * h + g]);
#pragma unroll
                for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        // written so that a bound or threshold of NaN passes
                        const bool passes = !(tile.bounds[m][n][2 * h + j] < threshold);
                        pending[m] |= static_cast<uint32_t>(passes) << (4 * n + 2 * h + j);
                    }
                }
            }
        }
        const auto offer = [&] {
            uint32_t turned_away = 0;
#pragma unroll
            for (int m = 0; m < kQueryTiles; ++m) {
                uint32_t again = 0;
                for (uint32_t left = pending[m]; left != 0; left &= left - 1) {
                    const int bit = __ffs(left) - 1;
                    float bound = 0, norm = 0;
#pragma unroll
                    for (int i = 0; i < 4 * kRowTiles; ++i) {
                        if (i == bit) bound = tile.bounds[m][i / 4][i % 4], norm = tile.norms[i / 4][i % 2];
                    }
                    if (norm != norm) continue;
                    const int query = 16 * m + 8 * (bit / 2 % 2) + g;
                    const uint64_t key = bound_key(bound, row + 8 * (bit / 4) + 2 * t + bit % 2);
                    if (!pools.offer(query, key)) again |= 1u << bit;
                }
                pending[m] = again;
                turned_away |= again;
            }
            return turned_away != 0;
        };
        pools.take(offer, share_threshold);
    }
    wait_copies(0);

    for (int query = warp; query < kQueries && first_query + query < s.n_queries; query += kWarps) {
        pools.flush(query, lane);
        if (lane == 0) share_threshold(query);
        uint64_t* const list =
            s.candidates + (static_cast<int64_t>(first_query + query) * s.plan.splits + split) * s.plan.kept;
        for (int i = lane; i < s.plan.kept; i += kWarp) list[i] = pools.query_keys(query)[i];
    }
}

// --- merge -------------------------------------------------------------------------------------------------------

// Writes the first k keys of a sorted pool as the scores and indices of a query; zeros (too few rows) as -inf and -1.
__device__ inline void write_answer(const Search& s, int query, const uint64_t* keys) {
    for (int i = threadIdx.x; i < s.k; i += blockDim.x) {
        const uint64_t key = keys[i];
        s.scores[static_cast<int64_t>(query) * s.k + i] = key ? key_score(key) : -INFINITY;
        s.indices[static_cast<int64_t>(query) * s.k + i] = key ? static_cast<int64_t>(key_row(key)) : -1;
    }
}

// Puts a query on the redo list. Called by one thread.
__device__ inline void ask_for_scan(const Search& s, int query) { s.redo[1 + atomicAdd(s.redo, 1)] = query; }

// Finds the result of a query among the `kept` best candidates of all parts, scored exactly. Called by the whole block.
// Returns true if it is proven that no other row belongs to the result.
template <class Format>
__device__ inline bool find_answer(const Search& s, int query, int capacity, int kept) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Pools pools(dynamic_shared(), 1, capacity, kept);
    uint64_t* const keys = pools.keys;
    const uint64_t threshold = s.thresholds[query];  // the key of a row that is kept
    select_best(pools, s.candidates + static_cast<int64_t>(query) * s.plan.splits * s.plan.kept,
                static_cast<int64_t>(s.plan.splits) * s.plan.kept, threshold ? threshold - 1 : 0);
    // At least the key of every row that was dropped, here or, by the threshold, in the first pass; zero: none was.
    const uint64_t last = max(keys[kept - 1], threshold);
    __syncthreads();

    const float* const elements = s.queries + static_cast<int64_t>(query) * s.rows.dim;
    for (int i = warp; i < capacity; i += kWarps) {
        const uint64_t key = i < kept ? keys[i] : 0;
        uint64_t exact_key = 0;
        if (key != 0) {
            const uint32_t row = key_row(key);
            const auto* row_elements = row_at<Format>(s.rows, row);
            const float scale = scale_at<Format>(s.rows, row);
            double sum = exact_lane(
                elements, [&](int64_t e) { return Format::value(row_elements[e], scale); }, s.rows.dim, lane);
            for (int mask = kExactLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
            exact_key = candidate_key(exact_round(sum), row);
        }
        if (lane == 0) keys[i] = exact_key;  // after the shuffles every lane has read the old key
    }
    __syncthreads();
    if (warp == 0) sort_descending(keys, capacity, lane);
    __syncthreads();
    write_answer(s, query, keys);

    bool proven = true;
    if (threadIdx.x == 0 && last != 0) {
        // Bound and score in the query's own scale. A dropped row with the last kept row's bound has a higher index.
        const double bound = ldexp(static_cast<double>(key_score(last)), -s.exponents[query]);
        const float kth = key_score(keys[s.k - 1]);
        const bool tied = s.exponents[query] == 0 && bound == kth && key_row(keys[s.k - 1]) <= key_row(last);
        proven = static_cast<float>(bound) < kth || tied;
    }
    return !__syncthreads_or(!proven);
}

// A block for each query.
template <class Format>
__global__ __launch_bounds__(kThreads) void merge_kernel(Search s) {
    const int query = blockIdx.x;
    const float error = s.errors[query];
    if (error != error) {
        for (int i = threadIdx.x; i < s.k; i += kThreads) {
            s.scores[static_cast<int64_t>(query) * s.k + i] = NAN;
            s.indices[static_cast<int64_t>(query) * s.k + i] = -1;
        }
        return;
    }
    if (s.plan.first_pass) {
        if (find_answer<Format>(s, query, s.plan.capacity, s.plan.kept)) return;
        // Many rows are nearly as good as the k-th. A second attempt with more of the parts' candidates takes 192 E
        // products in float64, the scan N E: it pays if it spares one query in N / 192 the scan.
        if (s.plan.kept < kMostKept && find_answer<Format>(s, query, kMostCapacity, kMostKept)) return;
    }
    if (threadIdx.x == 0) ask_for_scan(s, query);
}

}  // namespace valm
