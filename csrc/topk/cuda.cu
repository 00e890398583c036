// The CUDA part of the extension. So far it only reports the devices.
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#include "topk/topk.hpp"

namespace valm {

std::vector<std::string> cuda_devices() {
    int count = 0;
    if (cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
        throw std::runtime_error(cudaGetErrorString(status));
    }
    std::vector<std::string> lines;
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp prop;
        if (cudaError_t status = cudaGetDeviceProperties(&prop, device); status != cudaSuccess) {
            throw std::runtime_error(cudaGetErrorString(status));
        }
        std::ostringstream line;
        line << prop.name << ", sm_" << prop.major << prop.minor << ", " << prop.multiProcessorCount << " SMs, "
             << (prop.totalGlobalMem >> 20) << " MiB";
        lines.push_back(line.str());
    }
    return lines;
}

}  // namespace valm
