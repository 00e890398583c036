// Which kernels this machine runs.
#include <stdexcept>

#include "topk/cpu/first_pass.hpp"

namespace valm {

namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) kernels.push_back(&kAvx512Vnni);
    if (avx512) kernels.push_back(&kAvx512);
    if (avx2) kernels.push_back(&kAvx2);  // every processor with AVX2 has F16C
#endif
    kernels.push_back(&kGeneric);
    return kernels;
}

}  // namespace

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : usable()) names.push_back(kernels->name);
    return names;
}

const Kernels& kernels_for(const std::string& isa) {
    for (const Kernels* kernels : usable()) {
        if (kernels->name == isa) return *kernels;
    }
    throw std::invalid_argument("this machine does not run " + isa);
}

}  // namespace valm
