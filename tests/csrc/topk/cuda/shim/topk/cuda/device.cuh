// csrc/topk/cuda/device.cuh in plain C++, for machines without a GPU. The threads of a block are fibers of one
// operating system thread: one runs until it meets a barrier, a warp instruction or (in the random schedule) an atomic,
// then another goes on. Blocks run one after the other. The schedule decides which thread, warp and block is next, so
// that a missing barrier shows: in rising order one reads what a later one has yet to write, in falling order the other
// way round. An asynchronous copy arrives at once in rising order, in falling order when its thread waits for it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace valm {

using std::max;
using std::min;

struct Stream {};

namespace shim {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 256 * 1024;
// More steps of warps than any sound kernel of the tests takes; a loop without end goes beyond.
constexpr int64_t kMostSteps = int64_t{1} << 26;

enum class Order { kRising, kFalling, kRandom };
enum class Wait { kNothing, kWarp, kBlock, kEnd };
// What the lanes of a warp do together.
enum class Instruction { kSync, kVote, kShuffle, kMma };

// What a lane brings to a warp instruction, and what it takes away.
struct Exchange {
    uint32_t a[4], b[2];
    uint64_t value;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool there;
    int group;
};

struct Thread {
    Wait wait;
    bool started;
    ucontext_t context;
    jmp_buf resume;
    unsigned char* stack;
    Instruction instruction;    // at which it waits for its warp
    int warp_instructions;      // met so far: the exchange buffers alternate, so that a lane may run one ahead
    std::deque<Copy> copies;    // under way
    int groups, groups_waited;  // of copies
};

struct Block {
    Order order;
    std::mt19937_64 random;
    std::function<void()> body;
    std::vector<Thread> threads;
    std::vector<unsigned char> stacks;
    std::vector<uint4> shared{std::vector<uint4>(kSharedBytes / sizeof(uint4))};
    size_t shared_limit = kSharedBytes;  // what the card gives a block
    std::vector<Exchange> exchange[2];
    int current = 0;
    int barriers = 0;  // that the whole block has passed
    const char* error = nullptr;
    int64_t additions = 0;  // atomic ones, of all blocks so far
    int launches = 0;
    bool any[2] = {};  // votes, alternating between barriers
    jmp_buf scheduler;
    ucontext_t scheduler_context;
};

inline Block block;
inline dim3 thread_index, block_index, block_size, grid_size;

inline Thread& current_thread() { return block.threads[block.current]; }

// Gives the processor back; returns when the scheduler picks this thread again.
inline void yield(Wait wait) {
    Thread& thread = current_thread();
    thread.wait = wait;
    if (_setjmp(thread.resume) == 0) _longjmp(block.scheduler, 1);
}

inline void thread_main() {
    block.body();
    Thread& thread = current_thread();
    if (!thread.copies.empty() || thread.groups != thread.groups_waited)
        block.error = "a thread ends before its copies";
    thread.wait = Wait::kEnd;
    _longjmp(block.scheduler, 1);
}

inline void resume(int index) {
    block.current = index;
    thread_index = dim3(index, 0, 0);
    Thread& thread = block.threads[index];
    thread.wait = Wait::kNothing;
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
    setcontext(&thread.context);
}

inline bool all_wait(int first, int count, Wait wait) {
    const auto begin = block.threads.begin() + first;
    return std::all_of(begin, begin + count, [&](const Thread& thread) { return thread.wait == wait; });
}

// Runs each thread of a warp that can run, then lets the warp go on if all of it has met. False if none could run.
inline bool step_warp(int first, int count, std::vector<int>& lanes) {
    if (block.order == Order::kRandom) std::shuffle(lanes.begin(), lanes.end(), block.random);
    bool ran = false;
    for (const int lane : lanes) {
        if (lane >= count || block.threads[first + lane].wait != Wait::kNothing) continue;
        resume(first + lane);
        ran = true;
    }
    if (all_wait(first, count, Wait::kWarp)) {
        for (int i = first; i < first + count; ++i) {
            if (block.threads[i].instruction != block.threads[first].instruction) {
                throw std::runtime_error("the lanes of a warp meet at different instructions");
            }
        }
        for (int i = first; i < first + count; ++i) block.threads[i].wait = Wait::kNothing;
    }
    return ran;
}

inline void run_block(int threads, size_t shared_bytes) {
    if (shared_bytes > block.shared_limit) throw std::runtime_error("more shared memory than the card gives a block");
    std::memset(block.shared.data(), 0xff, kSharedBytes);  // NaN: what nobody wrote is seen
    block.stacks.resize(threads * kStackBytes);
    block.threads.assign(threads, Thread{});
    for (int i = 0; i < threads; ++i) block.threads[i].stack = block.stacks.data() + i * kStackBytes;
    for (auto& buffer : block.exchange) buffer.assign(threads, Exchange{});
    block.barriers = 0;
    block.error = nullptr;
    block.any[0] = block.any[1] = false;

    // In the fixed orders a warp goes as far as it can, to a barrier of the block, before the next one starts.
    std::vector<int> warps((threads + kWarpSize - 1) / kWarpSize), lanes(kWarpSize);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
    for (int i = 0; i < kWarpSize; ++i) lanes[i] = i;
    if (block.order == Order::kFalling) {
        std::reverse(warps.begin(), warps.end());
        std::reverse(lanes.begin(), lanes.end());
    }
    int64_t steps = 0;
    while (!all_wait(0, threads, Wait::kEnd)) {
        if (block.order == Order::kRandom) std::shuffle(warps.begin(), warps.end(), block.random);
        const bool ran = std::any_of(warps.begin(), warps.end(), [&](int warp) {
            return step_warp(warp * kWarpSize, std::min(kWarpSize, threads - warp * kWarpSize), lanes);
        });
        if (++steps > kMostSteps) throw std::runtime_error("the kernel does not end");
        if (all_wait(0, threads, Wait::kBlock)) {
            for (Thread& thread : block.threads) thread.wait = Wait::kNothing;
            ++block.barriers;
            block.any[block.barriers % 2] = false;  // the vote that comes next
        } else if (!ran) {
            throw std::runtime_error("deadlock: not all threads meet at a barrier");
        }
    }
    if (block.error) throw std::runtime_error(block.error);
    const auto* const bytes = reinterpret_cast<const unsigned char*>(block.shared.data());
    if (!std::all_of(bytes + shared_bytes, bytes + kSharedBytes, [](unsigned char byte) { return byte == 0xff; })) {
        throw std::runtime_error("written beyond the shared memory that the launch asked for");
    }
}

// One warp instruction: every lane brings `mine`; returns all lanes' exchanges once the whole warp has met.
inline Exchange* meet(Instruction instruction, const Exchange& mine) {
    Thread& thread = current_thread();
    thread.instruction = instruction;
    auto& buffer = block.exchange[thread.warp_instructions++ % 2];
    buffer[block.current] = mine;
    yield(Wait::kWarp);
    return buffer.data() + block.current / kWarpSize * kWarpSize;
}

inline void before_atomic() {
    if (block.order == Order::kRandom && block.random() % 4 == 0) yield(Wait::kNothing);
}

template <class To, class From>
To bits_as(From from) {
    To to{};
    static_assert(sizeof(From) <= sizeof(To) || sizeof(To) <= sizeof(From));
    std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
    return to;
}

inline std::vector<float> float16_values() {
    std::vector<float> values(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                                : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                                : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
        values[bits] = bits & 0x8000 ? -magnitude : magnitude;
    }
    return values;
}

inline float float16_value(uint16_t bits) {
    static const std::vector<float> values = float16_values();
    return values[bits];
}

// The nearest float16, ties to even.
inline uint16_t nearest_float16(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude == 0) return sign;
    if (value != value) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = std::max(exponent - 11, -24);  // exponent of the last place
    const int units = static_cast<int>(std::nearbyint(std::ldexp(static_cast<double>(magnitude), -unit)));
    return sign | static_cast<uint16_t>(units + ((unit + 24) << 10));
}

inline uint16_t nearest_bfloat16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// c + the 16 products, as tensor cores are known to add: each addend cut towards zero 23 bits below the largest one,
// then the sum cut to 24 bits.
inline float add_products(float c, const double (&products)[16]) {
    double largest = std::fabs(static_cast<double>(c)), plain = c;
    for (const double product : products) largest = std::max(largest, std::fabs(product)), plain += product;
    if (!(largest > 0) || !std::isfinite(plain)) return static_cast<float>(plain);
    int exponent = 0;
    std::frexp(largest, &exponent);
    const double unit = std::ldexp(1.0, exponent - 24), per_unit = 1 / unit;
    double units = std::trunc(c * per_unit);
    for (const double product : products) units += std::trunc(product * per_unit);
    const double sum = units * unit;
    const float nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace shim

inline uint4* dynamic_shared() { return shim::block.shared.data(); }

inline void sync_warp() { shim::meet(shim::Instruction::kSync, {}); }

inline bool any_in_warp(bool value) {
    shim::Exchange mine{};
    mine.value = value;
    const shim::Exchange* const lanes = shim::meet(shim::Instruction::kVote, mine);
    return std::any_of(lanes, lanes + shim::kWarpSize, [](const shim::Exchange& lane) { return lane.value != 0; });
}

template <class T>
T shuffle(T value, int lane) {
    shim::Exchange mine{};
    mine.value = shim::bits_as<uint64_t>(value);
    return shim::bits_as<T>(shim::meet(shim::Instruction::kShuffle, mine)[lane].value);
}

template <class T>
T shuffle_xor(T value, int mask) {
    return shuffle(value, shim::block.current % shim::kWarpSize ^ mask);
}

inline uint64_t atomic_max(uint64_t* address, uint64_t value) {
    shim::before_atomic();
    const uint64_t old = *address;
    *address = std::max(old, value);
    return old;
}

template <class T>
T atomicAdd(T* address, T value) {
    shim::before_atomic();
    ++shim::block.additions;
    const T old = *address;
    *address += value;
    return old;
}

namespace shim {

inline void finish(const Copy& copy) {
    if (copy.there) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
        std::memset(copy.to, 0, copy.bytes);
    }
}

}  // namespace shim

template <class Part>
void copy_async(Part* to, const void* from, bool there) {
    static_assert(sizeof(Part) == 16);
    if (reinterpret_cast<uintptr_t>(to) % sizeof(Part) != 0 || reinterpret_cast<uintptr_t>(from) % sizeof(Part) != 0) {
        shim::block.error = "a copy that is not aligned";
    }
    shim::Thread& thread = shim::current_thread();
    const shim::Copy copy{to, from, sizeof(Part), there, thread.groups};
    const bool late = shim::block.order == shim::Order::kFalling ||
                      (shim::block.order == shim::Order::kRandom && shim::block.random() % 2 == 0);
    late ? thread.copies.push_back(copy) : shim::finish(copy);
}

inline void commit_copies() { ++shim::current_thread().groups; }

inline void wait_copies(int most) {
    shim::Thread& thread = shim::current_thread();
    thread.groups_waited = std::max(thread.groups_waited, thread.groups - most);
    while (!thread.copies.empty() && thread.copies.front().group < thread.groups_waited) {
        shim::finish(thread.copies.front());
        thread.copies.pop_front();
    }
}

inline uint32_t pack_float16(float low, float high) {
    return shim::nearest_float16(low) | static_cast<uint32_t>(shim::nearest_float16(high)) << 16;
}

inline uint32_t pack_bfloat16(float low, float high) {
    return shim::nearest_bfloat16(low) | static_cast<uint32_t>(shim::nearest_bfloat16(high)) << 16;
}

inline float float16_value(uint16_t bits) { return shim::float16_value(bits); }
inline float __uint_as_float(uint32_t bits) { return shim::bits_as<float>(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline void __syncthreads() { shim::yield(shim::Wait::kBlock); }

inline int __syncthreads_or(int value) {
    const int vote = shim::block.barriers % 2;
    shim::block.any[vote] |= value != 0;
    shim::yield(shim::Wait::kBlock);
    return shim::block.any[vote];
}

enum class MmaInput { kFloat16, kBFloat16, kInt8 };

template <MmaInput kInput>
using MmaSum = std::conditional_t<kInput == MmaInput::kInt8, int32_t, float>;

// The fragment layouts are those that the PTX manual gives for mma.m16n8k16 with 16-bit inputs and mma.m16n8k32 with
// int8 ones. An int32 sum that overflows is an error, where a card would go on with it.
template <MmaInput kInput>
void mma(MmaSum<kInput> (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    constexpr int kWordValues = kInput == MmaInput::kInt8 ? 4 : 2, kHalf = 4 * kWordValues;
    shim::Exchange mine{};
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0, mine.b[1] = b1;
    const shim::Exchange* const lanes = shim::meet(shim::Instruction::kMma, mine);
    const auto value = [](uint32_t word, int place) -> double {
        if (kInput == MmaInput::kInt8) return static_cast<int8_t>(word >> (8 * place));
        const uint16_t bits = static_cast<uint16_t>(word >> (16 * place));
        return kInput == MmaInput::kFloat16 ? shim::float16_value(bits)
                                            : shim::bits_as<float>(static_cast<uint32_t>(bits) << 16);
    };
    // a[row][column] lies with lane 4 (row % 8) + column % kHalf / V, b[row][column] with lane
    // 4 column + row % kHalf / V, for V values in a word.
    const auto a_value = [&](int row, int column) {
        const int lane = row % 8 * 4 + column % kHalf / kWordValues;
        return value(lanes[lane].a[row / 8 + column / kHalf * 2], column % kWordValues);
    };
    const auto b_value = [&](int row, int column) {
        const int lane = column * 4 + row % kHalf / kWordValues;
        return value(lanes[lane].b[row / kHalf], row % kWordValues);
    };
    const int lane = shim::block.current % shim::kWarpSize;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double products[2 * kHalf];
        for (int k = 0; k < 2 * kHalf; ++k) products[k] = a_value(row, k) * b_value(k, column);
        if constexpr (kInput == MmaInput::kInt8) {
            const double sum = std::accumulate(products, products + 2 * kHalf, static_cast<double>(sums[i]));
            if (std::fabs(sum) >= 0x1p31) shim::block.error = "an int32 sum overflows";
            sums[i] = static_cast<int32_t>(static_cast<int64_t>(sum));
        } else {
            sums[i] = shim::add_products(sums[i], products);
        }
    }
}

template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, int threads, size_t shared_bytes, Stream, const Argument& argument) {
    ++shim::block.launches;
    shim::block.body = [=] { kernel(argument); };
    shim::block_size = dim3(threads);
    shim::grid_size = grid;
    std::vector<dim3> blocks;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y);
    }
    if (shim::block.order == shim::Order::kFalling) std::reverse(blocks.begin(), blocks.end());
    if (shim::block.order == shim::Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), shim::block.random);
    for (const dim3& index : blocks) {
        shim::block_index = index;
        shim::run_block(threads, shared_bytes);
    }
}

}  // namespace valm

#define threadIdx (::valm::shim::thread_index)
#define blockIdx (::valm::shim::block_index)
#define blockDim (::valm::shim::block_size)
#define gridDim (::valm::shim::grid_size)
