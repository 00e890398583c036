// The one C++ interface of exact top-K inner product search.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace valm {

// For each query the k database rows of largest inner product, by (score falling, row index rising).
// queries (Q, E), database (N, E): float32, row-major. scores (Q, k) float32, indices (Q, k) int64.
void ip_topk_cpu(const float* queries, int64_t n_queries, const float* database, int64_t n_rows, int64_t dim, int64_t k,
                 int threads, float* scores, int64_t* indices);

// One line per visible CUDA device; throws std::runtime_error with CUDA's own message when there is none.
std::vector<std::string> cuda_devices();

}  // namespace valm
