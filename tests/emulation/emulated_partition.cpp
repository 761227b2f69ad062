// The CUDA partition as a library for this machine's processor: the same C interface, `stream` unused.

#include <cstdint>

namespace {
int64_t beforehand = 128;  // how many regions are measured beforehand: a test tries several
}
#define GPSTOKEN_BEFOREHAND beforehand
#include "partition_cuda.cu"

extern "C" {

GPSTOKEN_API const char* gpstoken_cuda_error_string(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// Order of threads and blocks in later launches.
GPSTOKEN_API void emulation_set_seed(unsigned seed) { emulation::machine.seed = seed; }

GPSTOKEN_API void emulation_set_beforehand(int64_t regions_per_token) { beforehand = regions_per_token; }

// power() of partition_shared.h.
GPSTOKEN_API double emulation_power(double base, double exponent) { return gpstoken::power(base, exponent); }

}  // extern "C"
