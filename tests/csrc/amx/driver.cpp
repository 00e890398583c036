// The kernels of AMX beside the same ones with arrays as registers: every row that a first pass keeps, with its bound,
// and the answers of whole searches. On a processor without AMX its instructions are emulated. Prints how many were,
// and "ok"; exits with 1 at a difference, with 2 at what AMX forbids, and with 3 where neither the processor nor the
// emulator can run them.
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "emulator.hpp"
#include "simd/isa.hpp"
#include "topk/cpu/first_pass.hpp"
#include "topk/cpu/query.hpp"
#include "topk/topk.hpp"

#ifndef VALM_AMX

int main() {
    std::printf("the assembler knows no AMX\n");
    return 3;
}

#else

namespace valm {

// In place of topk/cpu/kernels.cpp, which gives AMX's kernels to processors with AMX alone.
const Kernels& topk_kernels(const std::string& isa) { return isa == "amxint8" ? kAmxInt8 : kTiles; }

}  // namespace valm

namespace {

uint32_t state = 1;
uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
float uniform() { return static_cast<float>(random_bits()) * 0x1p-23f - 1; }  // in [-1, 1)

void check(bool right, const char* what) {
    if (right) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
}

bool never() { return false; }

struct alignas(64) Line {
    uint8_t bytes[64];
};

std::vector<valm::Hit> hits_of(const valm::Kernels& kernels, const valm::Panel& panel,
                               const std::vector<valm::Tile>& tiles, const std::vector<float>& theta) {
    std::vector<valm::Hit> hits(theta.size() * valm::kPanelRows);
    if (kernels.begin != nullptr) kernels.begin(panel.steps);
    const valm::Hit* end = kernels.pass(panel, tiles.data(), tiles.size(), theta.data(), hits.data());
    if (kernels.end != nullptr) kernels.end();
    check(!amx::state.configured, "registers that are released");
    hits.resize(end - hits.data());
    return hits;
}

// A pass of tiles of so many queries over a panel of random codes.
void check_pass(int64_t steps, std::initializer_list<int> counts) {
    std::vector<Line> codes(steps * valm::kPanelRows * 4 / sizeof(Line));
    for (Line& line : codes) {
        for (uint8_t& byte : line.bytes) byte = static_cast<uint8_t>(1 + random_bits() % 255);
    }
    std::vector<float> stats(valm::kStats * valm::kPanelRows);
    for (float& value : stats) value = std::abs(uniform());
    std::vector<valm::Tile> tiles;
    std::vector<std::vector<Line> > queries;
    std::vector<float> theta;
    for (const int count : counts) {
        valm::Tile tile = {};
        tile.first = static_cast<int>(theta.size());
        tile.count = count;
        queries.emplace_back(valm::tile_bytes(valm::QueryLayout::kMatrix, steps, count) / sizeof(Line));
        for (int j = 0; j < count; ++j) {
            std::vector<int16_t> g(steps * 4);
            int sum = 0;
            for (int16_t& value : g) sum += value = static_cast<int16_t>(static_cast<int>(random_bits() % 255) - 127);
            tile.start[j] = -128 * sum;
            tile.along[j] = 1000 * uniform();
            tile.length[j] = std::abs(uniform());
            tile.error[j] = std::abs(uniform());
            theta.push_back(1000 * uniform());
            valm::lay_out(valm::QueryLayout::kMatrix, g.data(), steps, count, j, queries.back().data());
        }
        tile.codes = queries.back().data();
        tiles.push_back(tile);
    }
    const valm::Panel panel{codes[0].bytes, stats.data(), steps};
    const std::vector<valm::Hit> expected = hits_of(valm::kTiles, panel, tiles, theta);
    const std::vector<valm::Hit> found = hits_of(valm::kAmxInt8, panel, tiles, theta);
    check(!expected.empty() && expected.size() < theta.size() * valm::kPanelRows, "a pass that keeps some rows");
    check(found.size() == expected.size(), "the number of rows that are kept");
    for (size_t i = 0; i < found.size(); ++i) {
        check(found[i].query == expected[i].query && found[i].row == expected[i].row, "a row that is kept");
        check(std::memcmp(&found[i].upper, &expected[i].upper, sizeof found[i].upper) == 0, "a bound");
    }
}

// Whole searches on two threads, of rows packed before and in the call.
void check_search(int64_t dim, int64_t n_queries, int64_t count, const std::function<bool()>& handler) {
    constexpr int64_t kBest = 9;
    std::vector<float> rows(count * dim), queries(n_queries * dim);
    for (float& value : rows) value = uniform();
    for (float& value : queries) value = uniform();
    const valm::Rows stored{rows.data(), nullptr, valm::Element::kFloat32, count, dim};
    std::vector<Line> codes((count + valm::kPanelRows) * ((dim + 3) / 4 * 4) / sizeof(Line) + 1);
    std::vector<float> stats((count + valm::kPanelRows) * valm::kStats), centre(dim), axis(dim);
    const valm::PackedRows packed{codes[0].bytes, stats.data(), centre.data(), axis.data(), count, nullptr, nullptr};
    check(valm::pack(stored, packed, 0, "tiles", 2, never) == -1, "pack");
    std::vector<float> scores[4];
    std::vector<int64_t> indices[4];
    int run = 0;
    for (const char* isa : {"tiles", "amxint8"}) {
        for (const valm::PackedRows* first_pass : {&packed, static_cast<const valm::PackedRows*>(nullptr)}) {
            scores[run].resize(n_queries * kBest);
            indices[run].resize(n_queries * kBest);
            valm::ip_topk_cpu(queries.data(), n_queries, stored, 1, first_pass, kBest, nullptr, isa, 2, handler,
                              scores[run].data(), indices[run].data());
            check(scores[run] == scores[0] && indices[run] == indices[0], "the answer of a search");
            ++run;
        }
    }
}

int handled = 0;

// What a signal handler may do during a search.
bool search_another() {
    check(!amx::state.configured, "no registers in use where a handler runs");
    check_search(13, 3, 70, never);
    ++handled;
    return false;
}

int asked = 0;

// What stands in the way of AMX, with stand-ins for Linux's answer.
void check_obstacles() {
    using valm::amx_obstacle;
    const auto refused = [] { return ++asked, ENOSPC; };
    check(amx_obstacle(false, refused) == "no AMX with 8-bit integers in this processor or build" && asked == 0,
          "no AMX");
    check(amx_obstacle(true, refused).find("signal stack is too small") != std::string::npos, "AMX refused");
    check(asked == 1, "AMX asked for");
    const std::string forbidden = amx_obstacle(true, [] { return EPERM; });
    check(forbidden.find("Linux refuses AMX: ") == 0 && forbidden.find("stack") == std::string::npos, "AMX refused");
    check(amx_obstacle(true, [] { return 0; }).empty(), "AMX granted");
    check(amx_obstacle().empty() == (valm::cpu_isas()[0] == "amxint8"), "AMX used");
}

}  // namespace

int main() {
    check_obstacles();
    const std::string obstacle = valm::amx_obstacle();
    if (obstacle.find("Linux refuses") == 0) {  // then only some of the instructions end in a signal
        std::printf("%s\n", obstacle.c_str());
        return 3;
    }
    const bool native = obstacle.empty();
    if (!native) amx::emulate();
    for (const int64_t steps : {1, 3, 15, 16, 17, 31, 32, 50, 192}) {
        for (const int count : {1, 15, 16, 17, 31, 32}) check_pass(steps, {count});
        check_pass(steps, {17, 3});
        check_pass(steps, {16, 32, 5});
    }
    check_search(37, 40, 1100, never);
    check_search(77, 70, 1100, never);
    check_search(200, 5, 1100, never);
    check_search(77, 40, 20000, search_another);
    check(native || handled > 0, "a search that runs handlers");
    check(native || amx::emulated > 0, "instructions that ran");
    std::printf(native ? "on the processor\n" : "%lld instructions emulated\n", static_cast<long long>(amx::emulated));
    std::printf("ok\n");
}

#endif
