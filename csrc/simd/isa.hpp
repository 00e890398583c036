// The choice of the instruction set that the native code uses, made here only. For files that are compiled for any
// processor.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

// Whether the assembler of the compiler knows AMX; GCC 11 is the first to come with one that does.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define VALM_AMX
#endif

namespace valm {

// Each includes those before it. kTiles is AMX's code with arrays as its registers, for tests on any processor: only a
// build with VALM_KERNELS_EMULATE_AMX has it.
enum class Isa { kTiles, kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAmxInt8 };

// Names of the instruction sets that this processor runs, the best first: "amxint8", "avx512vnni", "avx512", "avx2",
// "generic", "tiles".
std::vector<std::string> cpu_isas();

// Why this process does not use AMX; empty where it does.
std::string amx_obstacle();

// The same from whether the processor has AMX's 8-bit integers and the error number, 0 for none, of asking Linux for
// them.
std::string amx_obstacle(bool in_processor, int (*ask)());

// The instruction set of that name. Throws std::invalid_argument, with the names that are allowed, where it is unknown
// or this processor lacks it.
Isa isa_named(const std::string& name);

// The best of an operation's kernels that the named instruction set runs. `compiled` has the best first; its last, of
// Isa::kGeneric or kTiles, runs where none is named.
template <class Kernels>
const Kernels& kernels_for(const std::string& name, std::initializer_list<std::pair<Isa, const Kernels*>> compiled) {
    const Isa isa = isa_named(name);
    const std::pair<Isa, const Kernels*>* best = compiled.begin();
    while (best->first > isa && best + 1 != compiled.end()) ++best;
    return *best->second;
}

}  // namespace valm
