#include "image_attn/kernels.hpp"

namespace valm {

extern const ImageAttnKernels image_attn_generic = kernels_named("generic");

}  // namespace valm
