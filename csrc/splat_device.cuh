// What both CUDA splatting kernels stand on: element types, pixel coordinates, tokens.
//
// The kernels (splat_forward.cuh, splat_backward.cuh) hold nothing of the host: nvcc, NVRTC and a plain C++17 compiler
// (tests/emulation stands in for blocks, warps and barriers) take them as they are. The formulas are those of splat.h.
// Only how they are rounded differs: a GPU for the desk has one double unit for 64 float ones, so pixel coordinates and
// boxes are found in float32 here, to the same bits.
//
// Both kernels gather: every output element is summed by one group of threads in one fixed order and written once.
// There are no atomics, no workspace, and a result never depends on the batch that an image is part of.
#pragma once

#include "splat.h"
#include "splat_arguments.h"

namespace gpstoken {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Element types, to and from float ----

__device__ __forceinline__ float load(const float* source) { return *source; }

__device__ __forceinline__ float load(const Float16* source) {
#if defined(__CUDACC__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(source->bits));
    return value;
#else
    return __half2float_bits(source->bits);
#endif
}

__device__ __forceinline__ float load(const BFloat16* source) {
    return __uint_as_float(static_cast<unsigned>(source->bits) << 16);
}

__device__ __forceinline__ void store(float* target, float value) { *target = value; }

__device__ __forceinline__ void store(Float16* target, float value) {
#if defined(__CUDACC__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target->bits) : "f"(value));
#else
    target->bits = __float2half_bits(value);
#endif
}

// To nearest, ties to even. Integer arithmetic, because the instruction is missing before sm_80.
__device__ __forceinline__ void store(BFloat16* target, float value) {
    const unsigned bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target->bits = static_cast<unsigned short>(is_nan ? 0x7fc0u : rounded);
}

// 2^x, to 2 ulp; 0 below the normal numbers, where exp2f() spends three more instructions.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDACC__)
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return exp2f(x);
#endif
}

// Four channels of texture, for one access to shared memory.
struct alignas(16) Quad {
    float value[4];
};

// ---- Pixel coordinates ----

// Coordinates of the samples of one axis. center(i) is the correctly rounded quotient (2 i - (n - 1)) / (n - 1): one
// step of Newton's correction after the product with the reciprocal gives the very bits of the division (Markstein
// 1990), for a third of its price.
struct Axis {
    float last;        // n - 1
    float reciprocal;  // 1 / (n - 1)

    __device__ __forceinline__ explicit Axis(int n)
        : last(static_cast<float>(n - 1)), reciprocal(n > 1 ? 1.0f / static_cast<float>(n - 1) : 0.0f) {}

    __device__ __forceinline__ float center(int i) const {
        const float numerator = fmaf(2.0f, static_cast<float>(i), -last);  // exact below 2^23 samples
        const float quotient = numerator * reciprocal;
        return fmaf(fmaf(-quotient, last, numerator), reciprocal, quotient);
    }
};

// The five numbers of one token.
struct Token {
    float sigma_x, sigma_y, rho, x, y;

    __device__ __forceinline__ explicit Token(const float* geometry)
        : sigma_x(geometry[0]), sigma_y(geometry[1]), rho(geometry[2]), x(geometry[3]), y(geometry[4]) {}

    // Whether it paints at all: the rule of splat.h, false for every NaN.
    __device__ __forceinline__ bool paints() const {
        return sigma_x >= FLT_MIN && sigma_x <= FLT_MAX && sigma_y >= FLT_MIN && sigma_y <= FLT_MAX &&
               fabsf(rho) < 1.0f && fabsf(x) <= FLT_MAX && fabsf(y) <= FLT_MAX;
    }
};

// Whether any coordinate in low..high passes |coordinate - center| <= half_width. Float subtraction is monotone, so
// with low and high themselves pixel centres this is exactly what testing each pixel between them would say.
__device__ __forceinline__ bool reaches(float center, float half_width, float low, float high) {
    return low - center <= half_width && center - high <= half_width;
}

}  // namespace cuda
}  // namespace gpstoken
