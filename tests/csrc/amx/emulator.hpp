// AMX's instructions for 8-bit integers on processors without them: a handler of SIGILL that decodes the instruction,
// carries it out on arrays and goes on behind it. So the machine code of kernels_amxint8.cpp runs in the tests, and
// what Intel's manual (Software Developer's Manual, volume 2, and volume 1, chapter 18) forbids ends the program.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

// Of a thread, as in the processor.
struct State {
    bool configured = false;
    int rows[kTiles] = {}, row_bytes[kTiles] = {};
    uint8_t tiles[kTiles][kMaxRows][kMaxBytes] = {};
};
inline thread_local State state;
inline std::atomic<int64_t> emulated{0};

inline void demand(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::_Exit(2);
}

inline void demand_configured(int tile) {
    demand(state.configured && tile < kTiles && state.rows[tile] > 0, "a tile without a shape");
}

inline void load_configuration(const uint8_t* from) {
    state = {};
    demand(from[0] == 1, "a palette other than 1");
    for (int i = 1; i < 16; ++i) demand(from[i] == 0, "a start row, or reserved bytes that are not zero");
    for (int tile = 0; tile < 16; ++tile) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, from + 16 + 2 * tile, sizeof row_bytes);
        const int rows = from[48 + tile];
        demand(row_bytes <= kMaxBytes && rows <= kMaxRows && (rows == 0) == (row_bytes == 0), "no shape of a tile");
        demand(tile < kTiles || rows == 0, "more than eight tiles");
        if (tile >= kTiles) continue;
        state.rows[tile] = rows;
        state.row_bytes[tile] = row_bytes;
    }
    state.configured = true;
}

inline void load(int tile, const uint8_t* from, int64_t stride) {
    demand_configured(tile);
    std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
    for (int row = 0; row < state.rows[tile]; ++row) {
        std::memcpy(state.tiles[tile][row], from + row * stride, state.row_bytes[tile]);
    }
}

inline void store(int tile, uint8_t* to, int64_t stride) {
    demand_configured(tile);
    for (int row = 0; row < state.rows[tile]; ++row) {
        std::memcpy(to + row * stride, state.tiles[tile][row], state.row_bytes[tile]);
    }
}

inline void zero(int tile) {
    demand_configured(tile);
    std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
}

// sums += signed bytes of `a` times unsigned bytes of `b`, four to a sum.
inline void add_products(int sums, int a, int b) {
    for (const int tile : {sums, a, b}) demand_configured(tile);
    demand(sums != a && sums != b && a != b, "a product with a tile twice");
    demand(state.rows[sums] == state.rows[a] && state.row_bytes[sums] == state.row_bytes[b] &&
               state.row_bytes[a] == 4 * state.rows[b] && state.row_bytes[sums] % 4 == 0,
           "a product of tiles whose shapes do not fit");
    for (int m = 0; m < state.rows[sums]; ++m) {
        for (int n = 0; n < state.row_bytes[sums] / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, state.tiles[sums][m] + 4 * n, sizeof sum);
            for (int k = 0; k < state.row_bytes[a] / 4; ++k) {
                for (int i = 0; i < 4; ++i) {
                    sum += static_cast<int8_t>(state.tiles[a][m][4 * k + i]) * state.tiles[b][k][4 * n + i];
                }
            }
            std::memcpy(state.tiles[sums][m] + 4 * n, &sum, sizeof sum);
        }
    }
}

// The instruction at `code`, in its encoding with three bytes of VEX; returns its length, 0 for another instruction.
inline int carry_out(const uint8_t* code, greg_t* registers) {
    constexpr int kNumbers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    enum Prefix { kNone, k66, kF3, kF2 };
    const bool in_map = code[0] == 0xC4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0;  // 0F38, W 0, 128 bits
    if (!in_map) return 0;
    const int more_reg = code[1] & 0x80 ? 0 : 8, more_index = code[1] & 0x40 ? 0 : 8,
              more_base = code[1] & 0x20 ? 0 : 8;
    const int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3, opcode = code[3];
    const int mod = code[4] >> 6, reg = (code[4] >> 3 & 7) + more_reg, rm = code[4] & 7;

    int length = 5;
    int64_t address = 0, stride = 0;
    if (mod != 3) {
        int base = rm;
        if (rm == 4) {
            const uint8_t sib = code[length++];
            const int index = (sib >> 3 & 7) + more_index;
            if (index != 4) stride = registers[kNumbers[index]] << (sib >> 6);
            base = sib & 7;
        }
        const bool has_base = !(mod == 0 && base == 5);
        int32_t displacement = 0;
        if (mod == 1) {
            displacement = static_cast<int8_t>(code[length++]);
        } else if (mod == 2 || !has_base) {
            std::memcpy(&displacement, code + length, sizeof displacement);
            length += 4;
        }
        address = displacement;
        if (has_base) address += registers[kNumbers[base + more_base]];
        if (!has_base && rm == 5) address += reinterpret_cast<int64_t>(code) + length;
    }
    uint8_t* const memory = reinterpret_cast<uint8_t*>(address);

    if (opcode == 0x49 && prefix == kNone && code[4] == 0xC0) {
        state = {};  // tilerelease
    } else if (opcode == 0x49 && prefix == kNone && mod != 3 && reg == 0) {
        load_configuration(memory);  // ldtilecfg
    } else if (opcode == 0x49 && prefix == kF2 && mod == 3 && rm == 0) {
        zero(reg);  // tilezero
    } else if (opcode == 0x4B && (prefix == kF2 || prefix == k66) && mod != 3 && rm == 4) {
        load(reg, memory, stride);  // tileloadd, tileloaddt1
    } else if (opcode == 0x4B && prefix == kF3 && mod != 3 && rm == 4) {
        store(reg, memory, stride);  // tilestored
    } else if (opcode == 0x5E && prefix == kF3 && mod == 3) {
        add_products(reg, rm + more_base, third);  // tdpbsud
    } else {
        return 0;
    }
    return length;
}

inline void handle(int, siginfo_t*, void* context) {
    greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const int length = carry_out(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    demand(length > 0, "an instruction that is not emulated");
    registers[REG_RIP] += length;
    ++emulated;
}

inline void emulate() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace amx
