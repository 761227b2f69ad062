// Scratch memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace gpstoken {

// Float scratch memory on cache lines, not initialised: what the threads that use it write first costs no serial pass.
constexpr std::align_val_t kCacheLine{64};

struct FreeBuffer {
    void operator()(float* floats) const { ::operator delete[](floats, kCacheLine); }
};
using Buffer = std::unique_ptr<float[], FreeBuffer>;

inline Buffer make_buffer(int64_t floats) { return Buffer(new (kCacheLine) float[static_cast<size_t>(floats)]); }

inline int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

inline int64_t round_up(int64_t value, int64_t step) { return divide_up(value, step) * step; }

}  // namespace gpstoken
