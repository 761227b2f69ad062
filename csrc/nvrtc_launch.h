// The other half of cuda_launch.h: kernels for a host side without CUDA's compiler and runtime. All that it has of them
// is their names; whoever loads the library compiles them by NVRTC and queues them through CUDA's driver
// (gpstoken_diffusers/ops/backend/run_time_kernels.py).
//
// Each stand-in is called as its kernel, so that the host side reads the same with either.
#pragma once

#include <stdio.h>

#include "cuda_launch.h"
#include "partition_arguments.h"
#include "splat_arguments.h"

using cudaStream_t = void*;
using cudaError_t = int;  // of the launcher, which has words of its own for it

inline const char* cudaGetErrorString(cudaError_t) { return "the launcher failed"; }

namespace gpstoken {
namespace cuda {

inline gpstoken_launcher launcher = nullptr;

template <class Arguments>
struct NamedKernel {
    const char* source;   // the file that defines it
    const char* name;     // in namespace gpstoken::cuda
    const char* element;  // its template arguments, if any: an element type, and a number of channels
    int channels;
};

template <class T>
inline constexpr const char* kElementName = nullptr;
template <>
inline constexpr const char* kElementName<float> = "float";
template <>
inline constexpr const char* kElementName<Float16> = "gpstoken::cuda::Float16";
template <>
inline constexpr const char* kElementName<BFloat16> = "gpstoken::cuda::BFloat16";

template <class T, int kChannels>
inline constexpr NamedKernel<SplatForward> splat_forward_kernel = {"splat_forward.cuh", "splat_forward_kernel",
                                                                   kElementName<T>, kChannels};
template <class T, int kChannels>
inline constexpr NamedKernel<SplatBackward> splat_backward_kernel = {"splat_backward.cuh", "splat_backward_kernel",
                                                                     kElementName<T>, kChannels};
inline constexpr NamedKernel<BiasSums> bias_rows_kernel = {"partition_bias.cuh", "bias_rows_kernel", nullptr, 0};
inline constexpr NamedKernel<BiasSums> bias_columns_kernel = {"partition_bias.cuh", "bias_columns_kernel", nullptr, 0};
inline constexpr NamedKernel<PartitionLevels> partition_levels_kernel = {"partition_levels.cuh",
                                                                         "partition_levels_kernel", nullptr, 0};
inline constexpr NamedKernel<PartitionList> partition_list_kernel = {"partition_list.cuh", "partition_list_kernel",
                                                                     nullptr, 0};

// As launch() of cuda_launch.h.
template <class Arguments>
int launch(const NamedKernel<Arguments>& kernel, int64_t blocks, int threads, cudaStream_t stream,
           const Arguments& args) {
    if (blocks > kLargestGrid) return GPSTOKEN_INVALID_ARGUMENT;
    if (launcher == nullptr) return GPSTOKEN_CUDA_ERROR;
    char name[128];
    if (kernel.element == nullptr) {
        snprintf(name, sizeof(name), "gpstoken::cuda::%s", kernel.name);
    } else {
        snprintf(name, sizeof(name), "gpstoken::cuda::%s<%s, %d>", kernel.name, kernel.element, kernel.channels);
    }
    const int code = launcher(kernel.source, name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                              stream, &args, static_cast<unsigned>(sizeof(args)));
    return code == 0 ? GPSTOKEN_OK : GPSTOKEN_CUDA_ERROR;
}

}  // namespace cuda
}  // namespace gpstoken
