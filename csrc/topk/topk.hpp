// The C++ interface of exact top-K inner product search. The caller checks shapes and dtypes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace valm {

// tests/csrc/topk/cuda/simulator.py counts its members.
enum class Element { kFloat32, kFloat16, kBFloat16, kInt8 };

// The element of "float32", "float16", "bfloat16" or "int8".
Element element_of(const std::string& dtype);

// Stored rows (count, dim), row-major. An int8 element stands for itself times its row's scale.
struct Rows {
    const void* data;
    const float* scale;  // (count), int8 only
    Element element;
    int64_t count, dim;
};

// The copy of the rows that the first pass reads: centred, 8 bits an element, in panels of kPanelRows rows.
// cpu/first_pass.hpp explains the numbers and proves their bound.
struct PackedRows {
    uint8_t* codes;  // (panels, ceil(dim / 4), kPanelRows, 4)
    float* stats;    // (panels, kStats, kPanelRows)
    float* centre;   // (dim)
    float* axis;     // (dim)
    int64_t count;   // rows packed
    // If the database holds equal rows, only the first of them is packed.
    const int32_t* row;             // (count) row of a packed position, rising; null: the position itself
    const int32_t* next_duplicate;  // (rows) the next equal row, 0 at the last; null: none are equal
};

constexpr int kPanelRows = 32;
constexpr int kStats = 4;

// `isa` below is one of cpu_isas() of simd/isa.hpp.
//
// The functions below with an argument `interrupted` call it on the calling thread about every 50 ms. If it returns
// true they return early, and their result is undefined.

// Groups equal rows: fills PackedRows::row with the first row of each group (room for rows.count) and
// next_duplicate (rows.count). Returns the number of groups.
int64_t find_duplicates(const Rows& rows, int threads, int32_t* row, int32_t* next_duplicate,
                        const std::function<bool()>& interrupted);

// Fills packed.codes, stats, centre and axis. If first_panel is not 0, fills only the panels from it on, with the
// given centre and axis. Returns the first row that holds NaN or infinity, or -1.
int64_t pack(const Rows& rows, const PackedRows& packed, int64_t first_panel, const std::string& isa, int threads,
             const std::function<bool()>& interrupted);

// For each query the k best rows by (score falling, row rising), scored as in exact.hpp: scores (n_queries, k), indices
// (n_queries, k); NaN and -1 for a query that is not finite. queries (n_queries, rows.dim).
// Without packed the rows are prepared and checked block by block in this call, which returns the first row that holds
// NaN or infinity, or -1.
// allowed (rows.count): the rows that may be returned, null for all. If fewer than k rows are allowed, results are
// padded with score -inf and index -1.
// Several databases of one size, without packed and allowed, follow each other in memory: `rows` is the first database,
// and queries, scores and indices follow each other too. The number of the row that is not finite counts from the first
// database on.
int64_t ip_topk_cpu(const float* queries, int64_t n_queries, const Rows& rows, int64_t n_databases,
                    const PackedRows* packed, int64_t k, const bool* allowed, const std::string& isa, int threads,
                    const std::function<bool()>& interrupted, float* scores, int64_t* indices);

// The score (exact.hpp) of query query_ids[i] and row row_ids[i], for each of n_pairs pairs. queries (any number,
// rows.dim padded with zeros to a multiple of kExactLanes).
void ip_scores_cpu(const float* queries, const Rows& rows, int64_t n_pairs, const int64_t* query_ids,
                   const int64_t* row_ids, const std::string& isa, int threads, float* scores);

}  // namespace valm
