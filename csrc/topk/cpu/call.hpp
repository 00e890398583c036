// State that a call of the CPU search shares with its caller: threads, signals, and the floating-point environment. For
// files that are compiled for any processor.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cfenv>
#include <chrono>
#include <functional>

namespace valm {

// The calling thread's number in its parallel region; 0 in a build without OpenMP.
inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// IEEE 754 arithmetic on one thread, during the lifetime of this object. A caller may have switched off denormal
// numbers on its own thread (torch.set_flush_denormal), and then threads would disagree on a score.
class PlainArithmetic {
  public:
    PlainArithmetic() {
        fegetenv(&before_);
        fesetenv(FE_DFL_ENV);
    }
    ~PlainArithmetic() { fesetenv(&before_); }
    PlainArithmetic(const PlainArithmetic&) = delete;
    PlainArithmetic& operator=(const PlainArithmetic&) = delete;

  private:
    fenv_t before_;
};

// Asks the caller about every 50 ms whether to stop. Use it only on the calling thread while no tiles of AMX are
// configured: the caller may run a signal handler, which may search, multiply, or change the floating-point
// environment.
class Interruption {
  public:
    explicit Interruption(const std::function<bool()>& interrupted) : interrupted_(interrupted) {}
    bool now() {
        const auto time = std::chrono::steady_clock::now();
        if (time - asked_ < std::chrono::milliseconds(50)) return false;
        asked_ = time;
        const PlainArithmetic plain;  // and again after the handler
        return interrupted_();
    }

  private:
    const std::function<bool()>& interrupted_;
    std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

}  // namespace valm
