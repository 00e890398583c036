// Top-K inner product search on CUDA devices. Addresses of device memory and the cudaStream_t come as integers. Nothing
// here allocates or waits, so everything can be captured in a CUDA graph. CUDA's errors become std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "topk/cuda/plan.hpp"

namespace valm {

// One line per visible CUDA device. Throws std::runtime_error with CUDA's own message if there is none.
std::vector<std::string> cuda_devices();

// An upper bound of each row's norm, an input of searches; NaN for a row that is not finite. norms (rows.count).
// Here and below rows.dim is a multiple of 16, and rows.data is aligned to 16 bytes.
void cuda_row_norms(int device, const Rows& rows, uintptr_t norms, uintptr_t stream);

// Bytes of workspace of one search.
int64_t cuda_topk_workspace(int device, int64_t n_queries, const Rows& rows, int k);

// For each query the k best rows by (score falling, row rising), scored as in exact.hpp: scores (n_queries, k), indices
// (n_queries, k). A row that is not finite is never returned: if too few are left, results are padded with score -inf
// and index -1. A query that is not finite gets scores NaN and indices -1. queries (n_queries, rows.dim), at least one.
// row_norms come from cuda_row_norms. `workspace` is aligned to 16 bytes and needs no initial value.
void ip_topk_cuda(int device, uintptr_t queries, int64_t n_queries, const Rows& rows, uintptr_t row_norms, int k,
                  uintptr_t workspace, uintptr_t scores, uintptr_t indices, uintptr_t stream);

}  // namespace valm
