#include <algorithm>
#include <functional>

#include "topk/exact.hpp"
#include "topk/topk.hpp"

namespace valm {

void ip_topk_cpu(const float* queries, int64_t n_queries, const float* database, int64_t n_rows, int64_t dim, int64_t k,
                 int threads, float* scores, int64_t* indices) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t q = 0; q < n_queries; ++q) {
        const float* query = queries + q * dim;
        std::vector<uint64_t> heap;  // worst kept candidate in front
        heap.reserve(k + 1);
        for (int64_t row = 0; row < n_rows; ++row) {
            const float* vector = database + row * dim;
            const float score = exact_score(query, [vector](int64_t e) { return vector[e]; }, dim);
            const uint64_t candidate = candidate_key(score, static_cast<uint32_t>(row));
            if (static_cast<int64_t>(heap.size()) == k && candidate < heap.front()) continue;
            heap.push_back(candidate);
            std::push_heap(heap.begin(), heap.end(), std::greater<>());
            if (static_cast<int64_t>(heap.size()) > k) {
                std::pop_heap(heap.begin(), heap.end(), std::greater<>());
                heap.pop_back();
            }
        }
        std::sort(heap.begin(), heap.end(), std::greater<>());
        for (int64_t i = 0; i < k; ++i) {
            scores[q * k + i] = key_score(heap[i]);
            indices[q * k + i] = key_row(heap[i]);
        }
    }
}

}  // namespace valm
