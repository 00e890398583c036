// The best candidates of a query, kept in shared memory. A pool takes keys until it is full. Then one warp sorts it,
// keeps the best and raises the threshold below which keys are not offered.
#pragma once

#include "topk/cuda/device.cuh"
#include "topk/cuda/plan.hpp"
#include "topk/exact.hpp"

namespace valm {

// Sorts `size` keys (a power of two, at least 2) in shared memory, largest first, bitonically. Called by one warp.
__device__ inline void sort_descending(uint64_t* keys, int size, int lane) {
    for (int run = 2; run <= size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            sync_warp();
            for (int pair = lane; pair < size / 2; pair += kWarp) {
                const int low = 2 * pair - (pair & (stride - 1));
                const uint64_t a = keys[low], b = keys[low + stride];
                const bool descending = (low & run) == 0;
                if (descending ? a < b : a > b) {
                    keys[low] = b;
                    keys[low + stride] = a;
                }
            }
        }
    }
    sync_warp();
}

// The pools of a block, one per query, in pool_bytes() of shared memory: each holds `capacity` keys (a power of two),
// of which a flush keeps `kept`. Block barriers separate offers and flushes. Two warps never flush the same pool.
struct Pools {
    uint64_t* keys;        // (queries, capacity)
    uint64_t* thresholds;  // (queries); a key must be above it
    uint32_t* counts;      // (queries); above capacity once offers have been turned away
    int queries;
    int capacity;
    int kept;

    __device__ Pools(void* memory, int queries, int capacity, int kept)
        : keys(static_cast<uint64_t*>(memory)),
          thresholds(keys + static_cast<size_t>(queries) * capacity),
          counts(reinterpret_cast<uint32_t*>(thresholds + queries)),
          queries(queries),
          capacity(capacity),
          kept(kept) {}

    __device__ uint64_t* query_keys(int query) const { return keys + static_cast<size_t>(query) * capacity; }

    // Called by one thread, before a barrier.
    __device__ void reset(int query, uint64_t threshold) const {
        thresholds[query] = threshold;
        counts[query] = 0;
    }

    // False if the pool is full: offer the key again after a flush.
    __device__ bool offer(int query, uint64_t key) const {
        if (key <= thresholds[query]) return true;
        const uint32_t slot = atomicAdd(&counts[query], 1u);
        if (slot >= static_cast<uint32_t>(capacity)) return false;
        query_keys(query)[slot] = key;
        return true;
    }

    // Called by one warp: sorts the pool and keeps the best. Unused places are zero, which is below every key.
    __device__ void flush(int query, int lane) const {
        uint64_t* const pool = query_keys(query);
        const int count = min(static_cast<int>(counts[query]), capacity);
        for (int i = count + lane; i < capacity; i += kWarp) pool[i] = 0;
        sort_descending(pool, capacity, lane);
        if (lane == 0) {
            counts[query] = min(count, kept);
            if (count >= kept) thresholds[query] = max(thresholds[query], pool[kept - 1]);
        }
    }

    // Called by the whole block: repeats `offer()`, which offers this thread's keys and returns whether a pool was
    // full, until no pool is. The lane that set a query's threshold calls `flushed(query)`.
    template <class Offer, class Flushed>
    __device__ void take(Offer offer, Flushed flushed) const {
        const int lane = threadIdx.x % kWarp;
        while (__syncthreads_or(offer())) {
            for (int query = threadIdx.x / kWarp; query < queries; query += kWarps) {
                if (counts[query] < static_cast<uint32_t>(capacity)) continue;
                flush(query, lane);
                if (lane == 0) flushed(query);
            }
            __syncthreads();
        }
    }
};

// A threshold that no key passes, for the padding queries of a tile.
__device__ inline uint64_t closed_threshold() { return candidate_key(INFINITY, 0); }

// Puts the best `kept` of `count` keys in device memory, sorted, into the only pool of `pools`. Called by the whole
// block. Zeros are not keys, and only keys above `threshold` are wanted.
__device__ inline void select_best(const Pools& pools, const uint64_t* keys, int64_t count, uint64_t threshold) {
    const int thread = threadIdx.x;
    if (thread == 0) pools.reset(0, threshold);
    __syncthreads();
    for (int64_t start = 0; start < count; start += kThreads) {
        bool pending = start + thread < count;
        const uint64_t key = pending ? keys[start + thread] : 0;
        pools.take([&] { return pending = pending && !pools.offer(0, key); }, [](int) {});
    }
    if (thread < kWarp) pools.flush(0, thread);
    __syncthreads();
}

}  // namespace valm
