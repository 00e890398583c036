// The choice of the instruction set that the native code uses, made here only. For files that are compiled for any
// processor.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace valm {

// Each includes those before it.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Vnni };

// Names of the instruction sets that this processor runs, the best first: "avx512vnni", "avx512", "avx2", "generic".
std::vector<std::string> cpu_isas();

// The instruction set of that name. Throws std::invalid_argument, with the names that are allowed, where it is unknown
// or this processor lacks it.
Isa isa_named(const std::string& name);

// The best of an operation's kernels that the named instruction set runs. `compiled`, the best first, ends in those of
// Isa::kGeneric.
template <class Kernels>
const Kernels& kernels_for(const std::string& name, std::initializer_list<std::pair<Isa, const Kernels*>> compiled) {
    const Isa isa = isa_named(name);
    const std::pair<Isa, const Kernels*>* best = compiled.begin();
    while (best->first > isa) ++best;
    return *best->second;
}

}  // namespace valm
