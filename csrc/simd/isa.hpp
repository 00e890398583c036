// The only place that chooses the instruction set of the native code. For files that are compiled for any processor.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

// Whether the compiler's assembler knows AMX, as it does from GCC 11 on.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define VALM_AMX
#endif

namespace valm {

// Each set includes the sets before it. kTiles is AMX's code with arrays as its registers, for tests on any processor.
// It exists only in a build with VALM_KERNELS_EMULATE_AMX.
enum class Isa { kTiles, kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAmxInt8 };

// Names of the instruction sets that this processor runs, best first: "amxint8", "avx512vnni", "avx512", "avx2",
// "generic", "tiles".
std::vector<std::string> cpu_isas();

// Why this process does not use AMX; empty if it does.
std::string amx_obstacle();

// amx_obstacle() for a processor with or without AMX's 8-bit integers, and a function that asks Linux for them and
// returns an error number, or 0.
std::string amx_obstacle(bool in_processor, int (*ask)());

// The instruction set of that name. Throws std::invalid_argument, with the allowed names, if it is unknown or this
// processor lacks it.
Isa isa_named(const std::string& name);

// The best of an operation's kernels that the named instruction set runs. `compiled` is sorted, best first; its last,
// of Isa::kGeneric or kTiles, runs for any name.
template <class Kernels>
const Kernels& kernels_for(const std::string& name, std::initializer_list<std::pair<Isa, const Kernels*>> compiled) {
    const Isa isa = isa_named(name);
    const std::pair<Isa, const Kernels*>* best = compiled.begin();
    while (best->first > isa && best + 1 != compiled.end()) ++best;
    return *best->second;
}

}  // namespace valm
