#include "int8_rows/kernels.hpp"

namespace valm {

const Int8RowKernels int8_rows_generic = {round_row, scale_row, multiply, multiply_floats, normalise, activate, attend};

}  // namespace valm
