// The choice among the kernels of the instruction sets.
#include "simd/isa.hpp"
#include "topk/cpu/first_pass.hpp"

namespace valm {

const Kernels& topk_kernels(const std::string& isa) {
    return kernels_for<Kernels>(isa, {
#if defined(__x86_64__)
#ifdef VALM_AMX
                                         {Isa::kAmxInt8, &kAmxInt8},
#endif
                                         {Isa::kAvx512Vnni, &kAvx512Vnni},
                                         {Isa::kAvx512, &kAvx512},
                                         {Isa::kAvx2, &kAvx2},
#endif
                                         {Isa::kGeneric, &kGeneric},
#ifdef VALM_KERNELS_EMULATE_AMX
                                         {Isa::kTiles, &kTiles},
#endif
                                     });
}

}  // namespace valm
