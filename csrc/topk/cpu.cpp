#include <algorithm>
#include <utility>

#include "topk/topk.hpp"

namespace valm {

namespace {

struct Candidate {
    float score;
    int64_t row;
};

// The order of the answer: higher score first, lower row first among equals.
bool better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
}

}  // namespace

void ip_topk_cpu(const float* queries, int64_t n_queries, const float* database, int64_t n_rows, int64_t dim, int64_t k,
                 int threads, float* scores, int64_t* indices) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t q = 0; q < n_queries; ++q) {
        const float* query = queries + q * dim;
        std::vector<Candidate> heap;  // worst kept candidate in front
        heap.reserve(k + 1);
        for (int64_t row = 0; row < n_rows; ++row) {
            const float* vector = database + row * dim;
            double sum = 0;
            for (int64_t e = 0; e < dim; ++e) sum += static_cast<double>(query[e]) * vector[e];
            const Candidate candidate{static_cast<float>(sum), row};
            if (static_cast<int64_t>(heap.size()) == k && !better(candidate, heap.front())) continue;
            heap.push_back(candidate);
            std::push_heap(heap.begin(), heap.end(), better);
            if (static_cast<int64_t>(heap.size()) > k) {
                std::pop_heap(heap.begin(), heap.end(), better);
                heap.pop_back();
            }
        }
        std::sort(heap.begin(), heap.end(), better);
        for (int64_t i = 0; i < k; ++i) {
            scores[q * k + i] = heap[i].score;
            indices[q * k + i] = heap[i].row;
        }
    }
}

}  // namespace valm
