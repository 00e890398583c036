#include "text_tower/kernels.hpp"

namespace valm {

const TextTowerKernels text_tower_generic = {round_row, scale_row, multiply, multiply_floats,
                                             normalise, activate,  attend};

}  // namespace valm
