// Working memory that outlives the call, so that no kernel allocates once it is warm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace sparsekv::SPARSEKV_ISA {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    // At least `bytes`, 64-byte aligned; the contents of an earlier call are gone.
    void* reserve(size_t bytes) {
        if (bytes > size_) {
            free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = aligned_alloc(64, size_);
            if (!memory_) abort();
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// Hands out consecutive 64-byte aligned arrays; with a null base it only counts.
class Carver {
  public:
    explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

    template <class T>
    T* take(size_t count) {
        T* array = reinterpret_cast<T*>(base_ + used_);
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return array;
    }
    size_t used() const { return used_; }

  private:
    uintptr_t base_;
    size_t used_ = 0;
};

// Asks for memory that is read soon, where hardware does not foresee it.
inline void prefetch(const void* memory, int64_t bytes) {
    const char* next = static_cast<const char*>(memory);
    for (const char* end = next + bytes; next < end; next += 64)
#if defined(__x86_64__)
        asm volatile("prefetcht1 %0" : : "m"(*next));  // a built-in one vanishes with calls that do nothing else
#else
        __builtin_prefetch(next, 0, 2);
#endif
}

}  // namespace sparsekv::SPARSEKV_ISA
