#if defined(__x86_64__)
#include "image_attn/kernels.hpp"

namespace valm {

extern const ImageAttnKernels image_attn_avx2 = kernels_named("avx2");

}  // namespace valm
#endif
