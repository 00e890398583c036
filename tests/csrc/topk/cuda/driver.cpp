// The CUDA kernels of top-K search as a library for the tests: built by g++ with shim/ before csrc/ on the include
// path.
#include <cstdio>

#include "topk/cuda/launch.cuh"

namespace {

template <class Function>
int guarded(int order, uint64_t seed, char* message, size_t message_bytes, Function function) {
    valm::shim::block.order = static_cast<valm::shim::Order>(order);
    valm::shim::block.random.seed(seed);
    try {
        function();
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(message, message_bytes, "%s", error.what());
        return 1;
    }
}

}  // namespace

extern "C" {

int row_norms(int order, uint64_t seed, char* message, size_t message_bytes, int element, const void* data,
              const float* scale, int64_t count, int64_t dim, float* norms) {
    return guarded(order, seed, message, message_bytes, [&] {
        valm::launch_row_norms({{data, scale, static_cast<valm::Element>(element), count, dim}, norms}, {});
    });
}

int64_t workspace_bytes(int64_t n_queries, int element, const void* data, const float* scale, int64_t count,
                        int64_t dim, int k, int multiprocessors, int64_t shared_bytes) {
    const valm::Rows rows{data, scale, static_cast<valm::Element>(element), count, dim};
    return valm::make_plan(n_queries, rows, k, {multiprocessors, shared_bytes, shared_bytes}).bytes;
}

// The figures of the first pass: 1 if there is one, queries of a block, stages, bytes of shared memory, 1 if the
// queries stay in device memory. Then the queries of a block of the exact scan.
void plan_figures(int64_t n_queries, int element, const void* data, const float* scale, int64_t count, int64_t dim,
                  int k, int multiprocessors, int64_t shared_bytes, int64_t* figures) {
    const valm::Rows rows{data, scale, static_cast<valm::Element>(element), count, dim};
    const auto plan = valm::make_plan(n_queries, rows, k, {multiprocessors, shared_bytes, shared_bytes + 1024});
    figures[0] = plan.first_pass, figures[1] = 16 * plan.query_tiles, figures[2] = plan.stages;
    figures[3] = plan.first_pass_shared, figures[4] = plan.streams_queries, figures[5] = plan.scan_queries;
}

// `redone`: how many queries the exact scan answered; `offered`: how many keys the pools were offered, those again that
// a full pool turned away; `launches` of kernels.
int search(int order, uint64_t seed, char* message, size_t message_bytes, int element, const void* data,
           const float* scale, int64_t count, int64_t dim, const float* norms, const float* queries, int n_queries,
           int k, int multiprocessors, int64_t shared_bytes, void* workspace, float* scores, int64_t* indices,
           int* redone, int64_t* offered, int* launches) {
    return guarded(order, seed, message, message_bytes, [&] {
        valm::Search search{};
        search.queries = queries;
        search.rows = {data, scale, static_cast<valm::Element>(element), count, dim};
        search.row_norms = norms;
        search.n_queries = n_queries;
        search.k = k;
        search.plan = valm::make_plan(n_queries, search.rows, k, {multiprocessors, shared_bytes, shared_bytes});
        search.scores = scores;
        search.indices = indices;
        valm::shim::block.shared_limit = shared_bytes;
        valm::shim::block.additions = valm::shim::block.launches = 0;
        valm::launch_search(search, workspace, {});
        *redone = *reinterpret_cast<const int*>(static_cast<const char*>(workspace) + search.plan.redo);
        *offered = valm::shim::block.additions - *redone;
        *launches = valm::shim::block.launches;
    });
}
}
