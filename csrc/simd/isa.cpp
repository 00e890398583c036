#include "simd/isa.hpp"

#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifdef VALM_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace valm {

namespace {

constexpr std::pair<Isa, const char*> kNames[] = {
    {Isa::kAmxInt8, "amxint8"}, {Isa::kAvx512Vnni, "avx512vnni"}, {Isa::kAvx512, "avx512"},
    {Isa::kAvx2, "avx2"},       {Isa::kGeneric, "generic"},
#ifdef VALM_KERNELS_EMULATE_AMX
    {Isa::kTiles, "tiles"},
#endif
};

bool has_amx() {
#ifdef VALM_AMX
    constexpr unsigned kTileBit = 1u << 24, kInt8Bit = 1u << 25;
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTileBit) != 0 && (edx & kInt8Bit) != 0;
#else
    return false;
#endif
}

// Linux saves AMX's registers only for a process that asks. Its threads and forked children inherit the permission; a
// program that it starts must ask again.
int ask_for_amx() {
#ifdef VALM_AMX
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
    return ENOSYS;
#endif
}

// The best instruction set of this processor, without sets whose registers the operating system does not save.
Isa find_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // every processor with AVX2 has F16C
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && amx_obstacle().empty()) return Isa::kAmxInt8;
    if (vnni) return Isa::kAvx512Vnni;
    if (avx512) return Isa::kAvx512;
    if (avx2) return Isa::kAvx2;
#endif
    return Isa::kGeneric;
}

Isa best_isa() {
    static const Isa best = find_best_isa();
    return best;
}

}  // namespace

std::string amx_obstacle(bool in_processor, int (*ask)()) {
    if (!in_processor) return "no AMX with 8-bit integers in this processor or build";
    const int error = ask();
    if (error == 0) return "";
    const std::string reason = std::string("Linux refuses AMX: ") + std::strerror(error);
    return error == ENOSPC ? reason + " (a thread's signal stack is too small for its registers)" : reason;
}

std::string amx_obstacle() {
    static const std::string obstacle = amx_obstacle(has_amx(), ask_for_amx);
    return obstacle;
}

std::vector<std::string> cpu_isas() {
    const Isa best = best_isa();
    std::vector<std::string> names;
    for (const auto& [isa, name] : kNames) {
        if (isa <= best) names.push_back(name);
    }
    return names;
}

Isa isa_named(const std::string& name) {
    const Isa best = best_isa();
    for (const auto& [isa, known] : kNames) {
        if (isa <= best && name == known) return isa;
    }
    std::string message = "the instruction set must be one that this processor runs (";
    for (const std::string& usable : cpu_isas()) message += (usable == cpu_isas().front() ? "" : ", ") + usable;
    throw std::invalid_argument(message + "), got " + name);
}

}  // namespace valm
