#if defined(__x86_64__)
#include "image_attn/kernels.hpp"

namespace valm {

extern const ImageAttnKernels image_attn_avx512 = kernels_named("avx512");

}  // namespace valm
#endif
