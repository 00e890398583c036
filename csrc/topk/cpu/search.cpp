// Exact top-K inner product search on the CPU. Threads take blocks of rows. For every query of a group, a thread bounds
// the scores of its block (the first pass), collects the rows that may belong to the result, and scores them exactly,
// highest bound first, until the bounds fall below the kth best. Threads share each query's kth best score, so that
// one thread's results raise the threshold of all threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "topk/cpu/call.hpp"
#include "topk/cpu/query.hpp"
#include "topk/exact.hpp"

namespace valm {

namespace {

// Bounds the group size times the number of threads, so that their buffers stay below 32 MiB. Larger k than kUsualBest
// lowers it.
constexpr int64_t kGroupTimesThreads = 8192;
constexpr int64_t kUsualBest = 128;
// The dimension for which Kernels::group_queries is chosen.
constexpr int64_t kUsualDim = 768;
// Rows collected for a query before they are scored.
constexpr int kBuffer = 256;
// Candidates that are scored exactly before the kth best is updated: k, within these limits. A full buffer is scored in
// such parts.
constexpr int64_t kFewestScored = 8, kMostScored = 32;
// Other candidates stay in the buffer, if at most this many are still in reach of the kth best.
constexpr int64_t kLeft = 192;
// A block's packed rows: a share of the second-level cache.
constexpr int64_t kBlockBytes = 256 << 10;
// Size of a block of rows that are multiplied as float32. Rows are read once, so long blocks are best.
constexpr int64_t kFloatBlockBytes = 2 << 20;
// Up to this many queries, unpacked rows are multiplied as float32. For more queries packing them first is cheaper.
constexpr int64_t kFloatQueries = 3;

// One thread's state for one query.
struct Find {
    uint32_t candidates = 0;  // in its buffer
    uint32_t kept = 0;        // of its best
    uint64_t kth = 0;         // key that theta was made from
    bool after = false;
};

// A cache line of the queries' integers, at which tiles begin.
struct alignas(64) Line {
    uint8_t bytes[64];
};

// One thread's buffers.
struct Worker {
    std::vector<Find> finds;           // (group)
    std::vector<float> theta;          // (group)
    std::vector<uint64_t> candidates;  // (group, kBuffer) keys of bounds and positions
    std::vector<uint64_t> best;        // (group, k + scored at once) keys of scored rows
    std::vector<Hit> hits;             // (group, kPanelRows)
    std::vector<uint8_t> codes;        // a block packed in this call
    std::vector<float> stats;
};

class Search {
  public:
    Search(const Rows& rows, const PackedRows* packed, int64_t k, const bool* allowed, const Kernels& kernels,
           int threads, int at_once, const std::function<bool()>& interrupted)
        : rows_(rows),
          kernels_(kernels),
          k_(k),
          scored_at_once_(std::clamp(k, kFewestScored, kMostScored)),
          allowed_(allowed),
          threads_(threads),
          at_once_(at_once),
          steps_((rows.dim + 3) / 4),
          interruption_(interrupted),
          workers_(threads) {
        if (packed != nullptr) {
            packed_rows_ = *packed;
        } else {
            centre_.resize(2 * rows.dim);
            packed_rows_ = {nullptr, nullptr, centre_.data(), centre_.data() + rows.dim, rows.count, nullptr, nullptr};
        }
        packed_ = packed != nullptr;
        if (allowed_ != nullptr) find_allowed();
    }

    // Answers all queries, unless interrupted or stopped by a broken row.
    void run(const float* queries, int64_t n_queries, float* scores, int64_t* indices);

    int64_t broken_row() const { return broken_ < rows_.count ? broken_.load() : -1; }

  private:
    void find_allowed();
    void start_group(const std::vector<int64_t>& members, const float* queries);
    bool search_group();  // false: interrupted
    void search_block(Worker& worker, int64_t block, size_t first_tile, size_t last_tile);
    void float_block(Worker& worker, int64_t begin, int64_t end);
    void collect(Worker& worker, int64_t query, float upper, int64_t position);
    void settle(Worker& worker, int64_t query, bool last);
    void score(Worker& worker, int64_t query, const uint64_t* begin, const uint64_t* end);
    void raise_kth(Worker& worker, int64_t query);
    float float_upper(int64_t query, int64_t row);
    // The key of a query's kth best so far, and the thresholds of the rows before and after it.
    struct Bar {
        uint64_t kth;
        float before, after;
    };
    Bar bar_of(int64_t query) const;
    void report_broken(int64_t row) {
        int64_t first = broken_;
        while (row < first && !broken_.compare_exchange_weak(first, row)) {
        }
    }
    void refresh(Worker& worker, int64_t query, uint64_t kth, bool after);
    void finish_group(float* scores, int64_t* indices);
    // The first row of a position; rises with it.
    int64_t row_at(int64_t position) const {
        return packed_rows_.row == nullptr ? position : packed_rows_.row[position];
    }
    // The first row of a position that may be returned.
    int64_t allowed_row_at(int64_t position) const {
        return allowed_rows_.empty() ? row_at(position) : allowed_rows_[position];
    }
    // The next equal row that may be returned; 0 if there is none.
    int32_t next_duplicate(int32_t row) const {
        while (true) {
            const int32_t next = packed_rows_.next_duplicate[row];
            if (next <= row) return 0;  // also if a file's row numbers were altered
            if (allowed_ == nullptr || allowed_[next]) return next;
            row = next;
        }
    }

    const Rows rows_;
    PackedRows packed_rows_;
    const Kernels& kernels_;
    const int64_t k_, scored_at_once_;
    const bool* const allowed_;
    std::vector<uint32_t> allowed_panels_;  // a bit for each position; empty: all are allowed
    std::vector<int32_t> allowed_rows_;     // by position, if rows are equal
    const int threads_, at_once_;           // of this search; the number of searches that run at once
    const int64_t steps_;
    bool packed_;
    bool float_pass_ = false;
    int64_t block_rows_ = 0, n_blocks_ = 0;
    std::vector<float> centre_;  // and axis, of an unpacked database
    std::unique_ptr<PaddedCentre> padded_centre_;
    std::atomic<int64_t> broken_{std::numeric_limits<int64_t>::max()};
    Interruption interruption_;

    // the current group
    std::vector<Query> group_;
    std::vector<float> values_;      // (group, dim padded)
    std::vector<int16_t> integers_;  // (group, steps * 4)
    std::vector<Line> tile_codes_;   // the integers, laid out as the kernels read them
    std::vector<Tile> tiles_;
    std::vector<std::atomic<uint64_t>> kth_ = std::vector<std::atomic<uint64_t>>(kMaxGroup);
    std::vector<Worker> workers_;
};

// Finds the positions that hold a row that may be returned, and the first such row of each.
void Search::find_allowed() {
    const int64_t count = packed_rows_.count;
    allowed_panels_.assign((count + kPanelRows - 1) / kPanelRows, 0);
    if (packed_rows_.next_duplicate != nullptr) allowed_rows_.resize(count);
    for (int64_t position = 0; position < count; ++position) {
        auto row = static_cast<int32_t>(row_at(position));
        if (!allowed_[row]) {
            row = packed_rows_.next_duplicate == nullptr ? 0 : next_duplicate(row);
            if (row == 0) continue;
        }
        if (!allowed_rows_.empty()) allowed_rows_[position] = row;
        allowed_panels_[position / kPanelRows] |= uint32_t{1} << (position % kPanelRows);
    }
}

void Search::run(const float* queries, int64_t n_queries, float* scores, int64_t* indices) {
    const int64_t dim = rows_.dim;
    float_pass_ = !packed_ && n_queries <= kFloatQueries;
    if (!packed_ && !float_pass_) {
        find_centre(rows_, packed_rows_.centre, packed_rows_.axis);
        padded_centre_ = std::make_unique<PaddedCentre>(packed_rows_, dim);
    }
    const int64_t row_bytes = float_pass_ ? dim * element_bytes(rows_.element) : steps_ * 4;
    const int64_t block_bytes = float_pass_ ? kFloatBlockBytes : kBlockBytes;
    block_rows_ = std::max<int64_t>(1, block_bytes / (row_bytes * kPanelRows)) * kPanelRows;
    n_blocks_ = (packed_rows_.count + block_rows_ - 1) / block_rows_;
    const int64_t group_times_threads = kGroupTimesThreads * kUsualBest / std::max(k_, kUsualBest);
    // Each group packs unpacked rows again. The integers of more short queries stay in the cache too.
    const int64_t short_queries = packed_ ? 1 : std::max<int64_t>(1, kUsualDim / dim);
    const int64_t largest = std::min<int64_t>(kMaxGroup, kernels_.group_queries * short_queries);
    const int64_t group = std::clamp<int64_t>(group_times_threads / (threads_ * at_once_), kMaxTile, largest);

    std::vector<int64_t> members;
    for (int64_t q = 0; q < n_queries || !members.empty(); ++q) {
        if (q < n_queries) {
            const float* query = queries + q * dim;
            if (std::all_of(query, query + dim, [](float value) { return std::isfinite(value); })) {
                members.push_back(q);
            } else {
                std::fill_n(scores + q * k_, k_, std::numeric_limits<float>::quiet_NaN());
                std::fill_n(indices + q * k_, k_, int64_t{-1});
            }
        }
        if (static_cast<int64_t>(members.size()) == group || (q + 1 >= n_queries && !members.empty())) {
            start_group(members, queries);
            if (!search_group() || broken_row() >= 0) return;
            finish_group(scores, indices);
            members.clear();
        }
    }
}

void Search::start_group(const std::vector<int64_t>& members, const float* queries) {
    const int64_t dim = rows_.dim, count = static_cast<int64_t>(members.size());
    const int64_t padded = padded_dim(dim);
    const int levels = query_levels(kernels_, dim);
    group_.assign(count, {});
    values_.assign(count * padded, 0);
    integers_.resize(count * steps_ * 4);
#pragma omp parallel num_threads(threads_)
    {
        const PlainArithmetic plain;
#pragma omp for
        for (int64_t i = 0; i < count; ++i) {
            float* values = values_.data() + i * padded;
            int16_t* integers = integers_.data() + i * steps_ * 4;
            std::copy_n(queries + members[i] * dim, dim, values);
            group_[i] = float_pass_ ? prepare_float_query(values, dim)
                                    : prepare_query(values, packed_rows_, dim, levels, integers);
            group_[i].output = members[i];
            kth_[i] = 0;
        }
    }

    tiles_.clear();
    tile_codes_.clear();
    const int64_t n_tiles = float_pass_ ? 0 : (count + kernels_.tile_queries - 1) / kernels_.tile_queries;
    for (int64_t t = 0; t < n_tiles; ++t) {
        const int64_t begin = t * count / n_tiles, end = (t + 1) * count / n_tiles;
        Tile tile = {};
        tile.first = static_cast<int>(begin);
        tile.count = static_cast<int>(end - begin);
        const size_t at = tile_codes_.size();
        tile_codes_.resize(at + tile_bytes(kernels_.layout, steps_, tile.count) / sizeof(Line));
        for (int j = 0; j < tile.count; ++j) {
            const Query& query = group_[begin + j];
            tile.start[j] = query.start;
            tile.along[j] = query.along;
            tile.length[j] = query.length;
            tile.error[j] = query.error;
            lay_out(kernels_.layout, integers_.data() + (begin + j) * steps_ * 4, steps_, tile.count, j,
                    &tile_codes_[at]);
        }
        tiles_.push_back(tile);
    }
    const Line* codes = tile_codes_.data();
    for (Tile& tile : tiles_) {
        tile.codes = codes;
        codes += tile_bytes(kernels_.layout, steps_, tile.count) / sizeof(Line);
    }

    for (Worker& worker : workers_) {
        worker.finds.assign(count, {});
        worker.theta.assign(count, -std::numeric_limits<float>::infinity());
        worker.candidates.resize(count * kBuffer);
        worker.best.resize(count * (k_ + scored_at_once_));
        worker.hits.resize(float_pass_ ? 0 : count * kPanelRows);
        if (!packed_ && !float_pass_) {
            worker.codes.resize(block_rows_ * steps_ * 4);
            worker.stats.resize(block_rows_ * kStats);
        }
    }
}

bool Search::search_group() {
    // If there are few blocks, threads share the tiles of a block too.
    const int64_t n_tiles = std::max<int64_t>(1, static_cast<int64_t>(tiles_.size()));
    const int64_t slices = std::clamp<int64_t>(4 * threads_ / n_blocks_, 1, n_tiles);
    // Consecutive blocks are about the golden section of their number apart, so that a sorted database does no harm.
    int64_t stride = std::max<int64_t>(1, static_cast<int64_t>(0.618 * static_cast<double>(n_blocks_)));
    while (std::gcd(stride, n_blocks_) != 1) ++stride;

    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};
#pragma omp parallel num_threads(threads_)
    {
        const PlainArithmetic plain;
        Worker& worker = workers_[thread_number()];
        for (int64_t task = next++; task < n_blocks_ * slices && !stopped; task = next++) {
            const int64_t block = task / slices * stride % n_blocks_, slice = task % slices;
            search_block(worker, block, slice * n_tiles / slices, (slice + 1) * n_tiles / slices);
            if (thread_number() == 0 && interruption_.now()) stopped = true;
        }
        for (int64_t query = 0; query < static_cast<int64_t>(group_.size()) && !stopped; ++query) {
            settle(worker, query, true);
        }
    }
    return !stopped;
}

void Search::search_block(Worker& worker, int64_t block, size_t first_tile, size_t last_tile) {
    const int64_t begin = block * block_rows_, end = std::min(begin + block_rows_, packed_rows_.count);
    if (float_pass_) return float_block(worker, begin, end);

    PackedRows here = packed_rows_;
    const int64_t panels = (end - begin + kPanelRows - 1) / kPanelRows;
    const int64_t first_panel = begin / kPanelRows;
    if (packed_) {
        here.codes += begin * steps_ * 4;
        here.stats += begin * kStats;
    } else {
        here.codes = worker.codes.data();
        here.stats = worker.stats.data();
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t bad = pack_panel(kernels_, rows_, here, *padded_centre_, first_panel + panel, panel);
            if (bad >= 0) report_broken(bad);
        }
    }

    const Tile& last = tiles_[last_tile - 1];
    for (int64_t query = tiles_[first_tile].first; query < last.first + last.count; ++query) {
        const uint64_t kth = kth_[query].load(std::memory_order_relaxed);
        refresh(worker, query, kth, row_at(begin) > key_row(kth));
    }
    if (kernels_.begin != nullptr) kernels_.begin(steps_);
    for (int64_t panel = 0; panel < panels; ++panel) {
        const Panel rows = {here.codes + panel * steps_ * kPanelRows * 4, here.stats + panel * kStats * kPanelRows,
                            steps_};
        const int64_t rows_here = std::min<int64_t>(kPanelRows, end - begin - panel * kPanelRows);
        uint32_t real = rows_here == kPanelRows ? ~0u : (1u << rows_here) - 1;
        if (!allowed_panels_.empty()) real &= allowed_panels_[first_panel + panel];
        const Hit* const hits_end =
            kernels_.pass(rows, &tiles_[first_tile], last_tile - first_tile, worker.theta.data(), worker.hits.data());
        for (const Hit* hit = worker.hits.data(); hit != hits_end; ++hit) {
            if (real >> hit->row & 1) collect(worker, hit->query, hit->upper, begin + panel * kPanelRows + hit->row);
        }
    }
    if (kernels_.end != nullptr) kernels_.end();
}

void Search::float_block(Worker& worker, int64_t begin, int64_t end) {
    for (int64_t query = 0; query < static_cast<int64_t>(group_.size()); ++query) {
        const uint64_t kth = kth_[query].load(std::memory_order_relaxed);
        refresh(worker, query, kth, begin > key_row(kth));
        for (int64_t row = begin; row < end; ++row) {
            const float upper = float_upper(query, row);
            if (allowed_ != nullptr && !allowed_[row]) continue;
            if (!(upper < worker.theta[query])) collect(worker, query, upper, row);
        }
    }
}

void Search::collect(Worker& worker, int64_t query, float upper, int64_t position) {
    Find& find = worker.finds[query];
    if (upper < worker.theta[query]) return;                                // theta rose since the kernel saw it
    if (std::isnan(upper)) upper = std::numeric_limits<float>::infinity();  // after an overflow
    worker.candidates[query * kBuffer + find.candidates++] = candidate_key(upper, static_cast<uint32_t>(position));
    if (find.candidates < kBuffer) return;
    settle(worker, query, false);
    const uint64_t kth = kth_[query].load(std::memory_order_relaxed);
    refresh(worker, query, kth, key_row(kth) <= row_at(position));  // for the rows that follow
}

// Brings a query's theta up to date.
void Search::refresh(Worker& worker, int64_t query, uint64_t kth, bool after) {
    Find& find = worker.finds[query];
    if (kth == find.kth && after == find.after) return;
    find.kth = kth;
    find.after = after;
    worker.theta[query] = threshold(group_[query], kth, after);
}

// Scores the collected rows with the best bounds exactly. Rows still in reach of the kth best wait in the buffer,
// because a better kth best may spare them. If there are many, or the search ends, they are scored too, as far as the
// bounds reach; float32 products first tighten the bounds of many rows.
void Search::settle(Worker& worker, int64_t query, bool last) {
    Find& find = worker.finds[query];
    uint64_t* const begin = worker.candidates.data() + query * kBuffer;
    uint64_t* end = begin + find.candidates;
    uint64_t* const rest = std::min(begin + scored_at_once_, end);
    if (rest != end) std::nth_element(begin, rest, end, std::greater<>());
    std::sort(begin, rest, std::greater<>());
    score(worker, query, begin, rest);

    const auto in_reach = [bar = bar_of(query).before](uint64_t key) { return !(key_score(key) < bar); };
    end = std::partition(rest, end, in_reach);
    find.candidates = 0;
    if (!last && end - rest <= kLeft) {
        find.candidates = static_cast<uint32_t>(std::copy(rest, end, begin) - begin);
        return;
    }
    if (end - rest > kMostScored) {
        for (uint64_t* key = rest; key != end; ++key) {
            const float upper = std::min(key_score(*key), float_upper(query, row_at(key_row(*key))));
            *key = candidate_key(upper, key_row(*key));
        }
        end = std::partition(rest, end, in_reach);
    }
    std::sort(rest, end, std::greater<>());
    score(worker, query, rest, end);
}

// Scores candidates in the order of their bounds, and stops when the bounds fall below the kth best.
void Search::score(Worker& worker, int64_t query, const uint64_t* begin, const uint64_t* end) {
    Find& find = worker.finds[query];
    uint64_t* const best = worker.best.data() + query * (k_ + scored_at_once_);
    Bar bar = bar_of(query);
    while (begin != end && !(key_score(*begin) < bar.before)) {
        const uint64_t* const stop = std::min(begin + scored_at_once_, end);
        const uint32_t before = find.kept;
        for (; begin != stop; ++begin) {
            const float upper = key_score(*begin);
            const int64_t row = allowed_row_at(key_row(*begin));
            if (upper < bar.before || (upper < bar.after && row > key_row(bar.kth))) continue;
            const uint64_t key =
                candidate_key(kernels_.exact(rows_, row, group_[query].values), static_cast<uint32_t>(row));
            if (key > bar.kth) best[find.kept++] = key;
        }
        if (find.kept == before) continue;
        raise_kth(worker, query);
        bar = bar_of(query);
    }
}

// Keeps the k best of a query's scored rows, and tells the other threads the kth best.
void Search::raise_kth(Worker& worker, int64_t query) {
    Find& find = worker.finds[query];
    if (find.kept < k_) return;
    uint64_t* const best = worker.best.data() + query * (k_ + scored_at_once_);
    std::nth_element(best, best + k_ - 1, best + find.kept, std::greater<>());
    find.kept = static_cast<uint32_t>(k_);
    uint64_t kth = kth_[query].load(std::memory_order_relaxed);
    while (best[k_ - 1] > kth && !kth_[query].compare_exchange_weak(kth, best[k_ - 1], std::memory_order_relaxed)) {
    }
}

Search::Bar Search::bar_of(int64_t query) const {
    const uint64_t kth = kth_[query].load(std::memory_order_relaxed);
    return {kth, threshold(group_[query], kth, false), threshold(group_[query], kth, true)};
}

// An upper bound from a float32 product, in the query's unit like the bounds of the first pass.
float Search::float_upper(int64_t query, int64_t row) {
    const Query& q = group_[query];
    float product, square;
    kernels_.dot(rows_, row, q.values, &product, &square);
    if (!std::isfinite(square) && !row_is_finite(rows_, row)) report_broken(row);
    // a partial sum that overflowed tells nothing about the whole
    if (!std::isfinite(product)) return std::numeric_limits<float>::infinity();
    // the square has the same relative error as the product; if it underflows, the row is below 1e-18
    const double error = float_error(rows_.dim);
    const double reach = q.norm * (std::sqrt(static_cast<double>(square)) * (1 + error) + 1e-18);
    const double upper = (product + error * reach - q.base) / q.unit;
    return static_cast<float>(upper + std::abs(upper) * 0x1p-22);
}

// Joins the threads' results. The k best of the first rows include the first row of every group in the result: a row
// better than a first row, or equal to it and before it, is better than all rows of its group.
void Search::finish_group(float* scores, int64_t* indices) {
#pragma omp parallel for num_threads(threads_)
    for (int64_t query = 0; query < static_cast<int64_t>(group_.size()); ++query) {
        std::vector<uint64_t> keys;
        for (const Worker& worker : workers_) {
            const uint64_t* best = worker.best.data() + query * (k_ + scored_at_once_);
            keys.insert(keys.end(), best, best + worker.finds[query].kept);
        }
        std::sort(keys.begin(), keys.end(), std::greater<>());
        if (static_cast<int64_t>(keys.size()) > k_) keys.resize(k_);
        if (packed_rows_.next_duplicate != nullptr) {
            for (size_t i = 0, first_rows = keys.size(); i < first_rows; ++i) {
                int32_t row = next_duplicate(static_cast<int32_t>(key_row(keys[i])));
                for (int64_t n = 1; n < k_ && row != 0; ++n, row = next_duplicate(row)) {
                    keys.push_back(candidate_key(key_score(keys[i]), static_cast<uint32_t>(row)));
                }
            }
            std::sort(keys.begin(), keys.end(), std::greater<>());
        }
        const int64_t at = group_[query].output * k_;
        for (int64_t i = 0; i < k_; ++i) {  // fewer than k rows are allowed, or a file's row numbers were altered
            const bool there = i < static_cast<int64_t>(keys.size());
            scores[at + i] = there ? key_score(keys[i]) : -std::numeric_limits<float>::infinity();
            indices[at + i] = there ? key_row(keys[i]) : int64_t{-1};
        }
    }
}

}  // namespace

int64_t ip_topk_cpu(const float* queries, int64_t n_queries, const Rows& rows, int64_t n_databases,
                    const PackedRows* packed, int64_t k, const bool* allowed, const std::string& isa, int threads,
                    const std::function<bool()>& interrupted, float* scores, int64_t* indices) {
    const Kernels& kernels = topk_kernels(isa);
    const int64_t bytes = rows.count * rows.dim * element_bytes(rows.element);
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> broken{kNone};
    std::atomic<bool> stopped{false};
    const auto search_one = [&](int64_t database, int threads_of_one, int at_once, bool asks) {
        const PlainArithmetic plain;
        const std::function<bool()> stops = [&] {
            if (asks && interrupted()) stopped = true;
            return stopped.load();
        };
        Rows here = rows;
        here.data = static_cast<const uint8_t*>(rows.data) + database * bytes;
        Search search(here, packed, k, allowed, kernels, threads_of_one, at_once, stops);
        const int64_t first = database * n_queries;
        search.run(queries + first * rows.dim, n_queries, scores + first * k, indices + first * k);
        if (search.broken_row() < 0) return;
        const int64_t row = database * rows.count + search.broken_row();
        int64_t before = broken;
        while (row < before && !broken.compare_exchange_weak(before, row)) {
        }
    };
    if (n_databases < threads) {
        for (int64_t database = 0; database < n_databases && !stopped; ++database)
            search_one(database, threads, 1, true);
    } else {  // each thread searches its own databases
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t database = 0; database < n_databases; ++database)
            if (!stopped) search_one(database, 1, threads, thread_number() == 0);
    }
    return broken == kNone ? -1 : broken.load();
}

}  // namespace valm
