// libgpstoken_nvrtc: the host side of the CUDA ops, from the same sources as libgpstoken_cuda, for a machine without
// nvcc. The C interface is described in gpstoken_native.h, how kernels come in, in nvrtc_launch.h.

#define GPSTOKEN_NVRTC
#include "partition_cuda.cu"
#include "splat_cuda.cu"

void gpstoken_set_launcher(gpstoken_launcher launcher) { gpstoken::cuda::launcher = launcher; }
