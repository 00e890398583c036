#if defined(__x86_64__)
#include "int8_rows/kernels.hpp"

namespace valm {

const Int8RowKernels int8_rows_avx2 = {round_row, scale_row, multiply};

}  // namespace valm
#endif
