// Kernels with one mistake each, to show that the emulation notices. Line numbers in its messages are of this file.

#include <cuda_runtime.h>

namespace {

struct Values {
    float* data;
};

// Half of the threads return before the barrier.
__global__ void misses_barrier(const Values args) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    args.data[threadIdx.x] = 1.0f;
}

// The lanes of one warp wait at two different barriers.
__global__ void splits_barrier(const Values args) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    args.data[threadIdx.x] = 1.0f;
}

// One lane takes no part in a ballot.
__global__ void misses_ballot(const Values args) {
    if (threadIdx.x == 7) return;
    args.data[threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffffu, true));
}

// No barrier between writing and reading a neighbour's value in shared memory.
__global__ void races(const Values args) {
    struct Row {
        float value[64];
    };
    GPSTOKEN_SHARED(Row, row);
    row.value[threadIdx.x] = static_cast<float>(threadIdx.x);
    args.data[threadIdx.x] = row.value[(threadIdx.x + 1) % 64];
}

// The same with a barrier, and a sum over each warp: nothing is wrong here.
__global__ void works(const Values args) {
    struct Row {
        float value[64];
    };
    GPSTOKEN_SHARED(Row, row);
    row.value[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    float sum = row.value[(threadIdx.x + 1) % 64];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    args.data[threadIdx.x] = sum;
}

}  // namespace

// Runs a kernel by name in one block of 64 threads; the emulation's message, "" for none.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(const char* name, float* data, unsigned seed) {
    struct Named {
        const char* name;
        void (*kernel)(Values);
    };
    const Named kernels[] = {{"misses_barrier", misses_barrier},
                             {"splits_barrier", splits_barrier},
                             {"misses_ballot", misses_ballot},
                             {"races", races},
                             {"works", works}};
    emulation::machine.seed = seed;
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(64);
    for (const Named& candidate : kernels) {
        if (strcmp(candidate.name, name) != 0) continue;
        const cudaError_t error = cudaLaunchKernelEx(&config, candidate.kernel, Values{data});
        return error == cudaSuccess ? "" : cudaGetErrorString(error);
    }
    return "no such kernel";
}
