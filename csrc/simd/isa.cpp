#include "simd/isa.hpp"

#include <stdexcept>

namespace valm {

namespace {

constexpr std::pair<Isa, const char*> kNames[] = {
    {Isa::kAvx512Vnni, "avx512vnni"}, {Isa::kAvx512, "avx512"}, {Isa::kAvx2, "avx2"}, {Isa::kGeneric, "generic"}};

// The best instruction set of this processor. If the operating system does not save the registers of one, the processor
// counts as one without it.
Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // every processor with AVX2 has F16C
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return Isa::kAvx512Vnni;
    if (avx512) return Isa::kAvx512;
    if (avx2) return Isa::kAvx2;
#endif
    return Isa::kGeneric;
}

}  // namespace

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
