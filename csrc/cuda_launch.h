// How the host side of every CUDA op queues its kernels: by the CUDA runtime where nvcc compiles both. With
// GPSTOKEN_NVRTC a plain C++ compiler takes the host side alone, and whoever loads the library queues them.
#pragma once

#include <stdint.h>

#include "gpstoken_native.h"
#if !defined(GPSTOKEN_NVRTC)
#include <cuda_runtime.h>
#endif

namespace gpstoken {
namespace cuda {

constexpr int64_t kLargestGrid = 0x7fffffff;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace gpstoken

#if defined(GPSTOKEN_NVRTC)
#include "nvrtc_launch.h"
#else

namespace gpstoken {
namespace cuda {

// A kernel takes one argument, a struct. The result is one of the codes of gpstoken_native.h.
template <class Arguments>
inline int launch(void (*kernel)(Arguments), int64_t blocks, int threads, cudaStream_t stream, const Arguments& args) {
    if (blocks > kLargestGrid) return GPSTOKEN_INVALID_ARGUMENT;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    if (error == cudaSuccess) return GPSTOKEN_OK;
    cudaGetLastError();  // reported here, so the next call must not meet it again
    return GPSTOKEN_CUDA_ERROR + static_cast<int>(error);
}

}  // namespace cuda
}  // namespace gpstoken

#endif
