// The user's bias on the GPU: for each pixel the sum of all above and left of it, itself included, in float64.
//
// Floating-point sums depend on their order, so it is that of the reference: along each row from the left, then down
// each column. One thread per row, then one per column.
#pragma once

#include "partition_arguments.h"

namespace gpstoken {
namespace cuda {

// to[i] = from[0] + ... + from[i], both with the same distance from one number to the next. May work in place.
template <class T>
__device__ __forceinline__ void running_sums(const T* from, double* to, long long stride, int count) {
    constexpr int kAhead = 8;  // memory answers late: several loads at a time
    double sum = 0.0;
    int i = 0;
    for (; i + kAhead <= count; i += kAhead) {
        T next[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) next[k] = from[(i + k) * stride];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) to[(i + k) * stride] = sum += static_cast<double>(next[k]);
    }
    for (; i < count; ++i) to[i * stride] = sum += static_cast<double>(from[i * stride]);
}

__global__ void __launch_bounds__(kBiasThreads) bias_rows_kernel(const BiasSums args) {
    const long long row = static_cast<long long>(blockIdx.x) * kBiasThreads + threadIdx.x;
    if (row < args.lines) running_sums(args.bias + row * args.width, args.sums + row * args.width, 1, args.width);
}

__global__ void __launch_bounds__(kBiasThreads) bias_columns_kernel(const BiasSums args) {
    const long long column = static_cast<long long>(blockIdx.x) * kBiasThreads + threadIdx.x;
    if (column >= args.lines) return;
    double* const top = args.sums + column / args.width * args.height * args.width + column % args.width;
    running_sums(top, top, args.width, args.height);
}

}  // namespace cuda
}  // namespace gpstoken
