// A libcuda.so.1 that loads and runs nothing. It keeps what Triton's C launcher passes to cuLaunchKernelEx, so that a
// test can compare it with what the kernel was called with. test_fake_driver.py builds it.
#include <stdint.h>

#include "cuda.h"

enum { kMostParameters = 256 };

static int parameters;
static uint64_t values[kMostParameters];
static unsigned config[5];  // grid x, y, z; threads of a block; bytes of its shared memory
static uintptr_t handle = 16;

// How many parameters the next launch has: cuLaunchKernelEx is not told.
void fake_expect(int count) { parameters = count < kMostParameters ? count : kMostParameters; }
const uint64_t* fake_values(void) { return values; }
const unsigned* fake_config(void) { return config; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void** arguments, void** extra) {
    config[0] = launch->gridDimX, config[1] = launch->gridDimY, config[2] = launch->gridDimZ;
    config[3] = launch->blockDimX, config[4] = launch->sharedMemBytes;
    // A parameter has 8 bytes at the most. Shorter ones leave bytes of their neighbours, which a reader cuts off.
    for (int i = 0; i < parameters; ++i) values[i] = *(const uint64_t*)arguments[i];
    return CUDA_SUCCESS;
}

// An H100's limits.
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = 232448;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            *value = 233472;
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 132;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
            *value = 65536;
            break;
        default:
            *value = 32;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = (CUmodule)(handle += 16);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)(handle += 16);
    return CUDA_SUCCESS;
}

// The tensors of the test are the CPU's, whose addresses stand for the GPU's.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr*)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult result, const char** text) { return *text = "fake", CUDA_SUCCESS; }
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values, CUdeviceptr pointer) {
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
    return *count = 1, CUDA_SUCCESS;
}
