// Huge pages for large memory that is about to be written for the first time: fewer page faults, and later fewer misses
// of the address cache.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace valm {

// Only advice: if the system rejects it, pages stay small.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t start = (address + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t stop = (address + bytes) / kHugePage * kHugePage;
    if (start < stop) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#endif
}

}  // namespace valm
