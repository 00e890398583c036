// The instructions that the top-K kernels use and plain C++ lacks. tests/ has a second file of this name with the
// same functions in plain C++, so that the kernels also run without a GPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace valm {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline uint4* dynamic_shared() {
    extern __shared__ uint4 shared_memory[];
    return shared_memory;
}

__device__ inline void sync_warp() { __syncwarp(kWholeWarp); }
__device__ inline bool any_in_warp(bool value) { return __any_sync(kWholeWarp, value); }

template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(kWholeWarp, value, mask);
}

template <class T>
__device__ inline T shuffle(T value, int lane) {
    return __shfl_sync(kWholeWarp, value, lane);
}

// Returns the old value.
__device__ inline uint64_t atomic_max(uint64_t* address, uint64_t value) {
    return atomicMax(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// Two floats rounded to the nearest 16-bit value; `low` in the lower half of the word.
__device__ inline uint32_t pack_float16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ inline uint32_t pack_bfloat16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ inline float float16_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Starts the copy of 16 bytes, aligned to as many, from device to shared memory, past the first-level cache; zeros if
// not `there`. The second-level cache also fetches the rest of the 256 bytes, which the next slabs of the row need. The
// copy belongs to the next commit_copies() of this thread.
template <class Part>
__device__ inline void copy_async(Part* to, const void* from, bool there) {
    static_assert(sizeof(Part) == 16);
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = there ? sizeof(Part) : 0;
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the `most` newest groups of this thread's copies are in flight. `most` is at most 3.
__device__ inline void wait_copies(int most) {
    if (most == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (most == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (most == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (most == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
}

enum class MmaInput { kFloat16, kBFloat16, kInt8 };

template <MmaInput kInput>
using MmaSum = std::conditional_t<kInput == MmaInput::kInt8, int32_t, float>;

// sums (16 x 8) += a (16 x 8V) b (8V x 8), for V values in a word: the PTX instructions mma.m16n8k16 with float32 sums
// and, for int8, mma.m16n8k32 with int32 sums. With g = lane / 4 and t = lane % 4, a lane holds
//   a:    rows g, g + 8, g, g + 8 of the V columns from Vt on (first two words), from Vt + 4V on (last two)
//   b:    column g of the V rows from Vt on (first word), from Vt + 4V on (second)
//   sums: row g of columns 2t and 2t + 1, then row g + 8 of the same columns
template <MmaInput kInput>
__device__ inline void mma(MmaSum<kInput> (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kInput == MmaInput::kFloat16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else if constexpr (kInput == MmaInput::kInt8) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

using Stream = cudaStream_t;

template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, int threads, size_t shared_bytes, Stream stream,
            const Argument& argument) {
    // Above 48 KiB a kernel must ask for its shared memory. Allowed while a CUDA graph is being captured.
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "shared memory of a top-K kernel");
    kernel<<<grid, threads, shared_bytes, stream>>>(argument);
    check_cuda(cudaGetLastError(), "launch of a top-K kernel");
}

}  // namespace valm
