// The CUDA part of the extension (search.hpp).
#include <sstream>

#include "topk/cuda/launch.cuh"
#include "topk/cuda/search.hpp"

namespace valm {

namespace {

// The statically linked CUDA runtime has its own current device, so every call sets it. The caller restores PyTorch's
// (torch.cuda.device): restoring it here would make a context on GPU 0 in a thread without a context.
void use_device(int device) { check_cuda(cudaSetDevice(device), "choice of the CUDA device"); }

DeviceLimits device_limits(int device) {
    const auto attribute = [&](cudaDeviceAttr name) {
        int value = 0;
        check_cuda(cudaDeviceGetAttribute(&value, name, device), "limits of the CUDA device");
        return value;
    };
    return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

}  // namespace

std::vector<std::string> cuda_devices() {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "CUDA devices");
    std::vector<std::string> lines;
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp prop;
        check_cuda(cudaGetDeviceProperties(&prop, device), "properties of the CUDA device");
        std::ostringstream line;
        line << prop.name << ", sm_" << prop.major << prop.minor << ", " << prop.multiProcessorCount << " SMs, "
             << (prop.totalGlobalMem >> 20) << " MiB";
        lines.push_back(line.str());
    }
    return lines;
}

void cuda_row_norms(int device, const Rows& rows, uintptr_t norms, uintptr_t stream) {
    use_device(device);
    launch_row_norms({rows, reinterpret_cast<float*>(norms)}, reinterpret_cast<Stream>(stream));
}

int64_t cuda_topk_workspace(int device, int64_t n_queries, const Rows& rows, int k) {
    return make_plan(n_queries, rows, k, device_limits(device)).bytes;
}

void ip_topk_cuda(int device, uintptr_t queries, int64_t n_queries, const Rows& rows, uintptr_t row_norms, int k,
                  uintptr_t workspace, uintptr_t scores, uintptr_t indices, uintptr_t stream) {
    use_device(device);
    Search search{};
    search.queries = reinterpret_cast<const float*>(queries);
    search.rows = rows;
    search.row_norms = reinterpret_cast<const float*>(row_norms);
    search.n_queries = static_cast<int>(n_queries);
    search.k = k;
    search.plan = make_plan(n_queries, rows, k, device_limits(device));
    search.scores = reinterpret_cast<float*>(scores);
    search.indices = reinterpret_cast<int64_t*>(indices);
    launch_search(search, reinterpret_cast<void*>(workspace), reinterpret_cast<Stream>(stream));
}

}  // namespace valm
