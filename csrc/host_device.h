// What lets one source be taken by nvcc, by NVRTC, and by a plain C++17 compiler: for the CPU libraries, and for the
// tests that run kernels on the host.
#pragma once

#if defined(__CUDACC_RTC__)
// NVRTC has no C library: its mathematical functions are there by themselves, and this is what else is used of one.
#define FLT_MIN 1.17549435e-38f
#define FLT_MAX 3.40282347e+38f
namespace gpstoken {
using int32_t = int;
using int64_t = long long;
}  // namespace gpstoken
#else
#include <float.h>
#include <math.h>
#include <stdint.h>
#endif

#if defined(__CUDACC__)
#define GPSTOKEN_INLINE __host__ __device__ __forceinline__
#else
#define GPSTOKEN_INLINE inline
#endif

// One variable per block in shared memory; the host emulation has its own.
#if !defined(GPSTOKEN_SHARED)
#define GPSTOKEN_SHARED(Type, name) __shared__ Type name
#endif
