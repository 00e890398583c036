// Scores of pairs of a query and a row that the caller names.
#include "topk/cpu/call.hpp"
#include "topk/cpu/query.hpp"

namespace valm {

void ip_scores_cpu(const float* queries, const Rows& rows, int64_t n_pairs, const int64_t* query_ids,
                   const int64_t* row_ids, const std::string& isa, int threads, float* scores) {
    const Kernels& kernels = topk_kernels(isa);
    const int64_t padded = padded_dim(rows.dim);
#pragma omp parallel num_threads(threads)
    {
        const PlainArithmetic plain;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_pairs; ++i) {
            scores[i] = kernels.exact(rows, row_ids[i], queries + query_ids[i] * padded);
        }
    }
}

}  // namespace valm
