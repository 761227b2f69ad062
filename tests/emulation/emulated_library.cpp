// The CUDA library as a library for this machine's processor: the same C interface, `stream` unused.

#include "splat_cuda.cu"

// Order of threads and blocks in later launches.
extern "C" GPSTOKEN_API void emulation_set_seed(unsigned seed) { emulation::machine.seed = seed; }

// center(0..n-1) of an axis of n pixels.
extern "C" GPSTOKEN_API void emulation_axis(int n, float* centers) {
    const gpstoken::cuda::Axis axis(n);
    for (int i = 0; i < n; ++i) centers[i] = axis.center(i);
}
