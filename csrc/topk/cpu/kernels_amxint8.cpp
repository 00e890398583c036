// The kernels for AMX: 16 x 16 sums of 64 products of bytes per instruction.
#include "simd/isa.hpp"
#ifdef VALM_AMX

#include "topk/cpu/matrix_pass.hpp"

namespace valm {
namespace {

// In assembly, because GCC's intrinsics take a register's number only as a literal, not from a template.
struct Registers {
    template <int r>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(r));
    }
    template <int r>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(r) : "memory");
    }
    template <int r>
    static void load_once(const void* from, int64_t stride) {
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(r) : "memory");
    }
    template <int r>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(r) : "memory");
    }
    template <int sum, int queries, int codes>
    static void add() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(queries), "i"(codes));
    }
};

// What ldtilecfg reads: the shapes of matrix_pass.hpp's registers.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);

void begin(int64_t steps) {
    Shapes shapes;
    const int held = static_cast<int>(matrix_steps(steps));
    for (int r = 0; r < 8; ++r) {
        const bool queries = r == 4 || r == 5, codes = r == 6 || r == 7;
        shapes.row_bytes[r] = static_cast<uint16_t>(queries ? held * 4 : kMatrixBytes);
        shapes.rows[r] = static_cast<uint8_t>(codes ? held : kMatrixRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

void end() { asm volatile("tilerelease"); }

}  // namespace

const Kernels kAmxInt8 = {QueryLayout::kMatrix,   kMaxTile, kMaxGroup, begin, end,
                          matrix_pass<Registers>, pack_row, dot,       exact};

}  // namespace valm

#endif
