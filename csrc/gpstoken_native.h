/* The C interface of the native libraries: plain pointers and sizes, no torch, no C++ types.
 *
 * libgpstoken_cpu, libgpstoken_cuda and libgpstoken_nvrtc export the functions below;
 * gpstoken_diffusers/ops/backend/native.py loads them with ctypes. Raise GPSTOKEN_ABI_VERSION whenever a signature or
 * the meaning of an argument changes, here and in native.py: a library of another version is refused instead of called
 * wrongly.
 *
 * Conventions
 *   - every array is dense and row-major; the caller owns all memory;
 *   - geometry is float32, (batch, tokens, 5) = sigma_x, sigma_y, rho, x, y; grad_geometry likewise;
 *   - texture, out, grad_out and grad_texture have the element type that `dtype` names; sums are kept in float32;
 *   - outputs are overwritten, so they need no initialisation;
 *   - a size of zero is legal wherever it makes sense;
 *   - the result is 0 (GPSTOKEN_OK) or one of the codes below.
 */
#ifndef GPSTOKEN_NATIVE_H
#define GPSTOKEN_NATIVE_H

#include <stdint.h>

#define GPSTOKEN_ABI_VERSION 4

#if defined(_WIN32)
#define GPSTOKEN_API __declspec(dllexport)
#else
#define GPSTOKEN_API __attribute__((visibility("default")))
#endif

/* Element types. */
#define GPSTOKEN_FLOAT32 0
#define GPSTOKEN_FLOAT16 1
#define GPSTOKEN_BFLOAT16 2

/* Result codes. A CUDA runtime error e is reported as GPSTOKEN_CUDA_ERROR + e. */
#define GPSTOKEN_OK 0
#define GPSTOKEN_INVALID_ARGUMENT 1
#define GPSTOKEN_UNSUPPORTED_DTYPE 2
#define GPSTOKEN_OUT_OF_MEMORY 3
#define GPSTOKEN_TOO_MANY_TOKENS 4 /* partition: fewer splittable regions than tokens asked for */
#define GPSTOKEN_CUDA_ERROR 1000

#ifdef __cplusplus
extern "C" {
#endif

/* Every library. */
GPSTOKEN_API int gpstoken_abi_version(void);

/* ---- libgpstoken_cpu ---- */

/* The instruction set that run-time dispatch picked: "avx512", "avx2" or "baseline". */
GPSTOKEN_API const char* gpstoken_cpu_isa(void);

/* out (B, C, H, W) = sum over tokens of weight * texture; see splat.h for the weight. */
GPSTOKEN_API int gpstoken_splat_forward_cpu(const float* geometry, const void* texture, void* out, int64_t B, int64_t N,
                                            int64_t C, int64_t H, int64_t W, float support, int dtype, int num_threads);

/* Gradients of sum(out * grad_out) with the boxes held fixed. */
GPSTOKEN_API int gpstoken_splat_backward_cpu(const float* geometry, const void* texture, const void* grad_out,
                                             float* grad_geometry, void* grad_texture, int64_t B, int64_t N, int64_t C,
                                             int64_t H, int64_t W, float support, int dtype, int num_threads);

/* grey (B, H, W) in [-1, 1] and an optional per-pixel bias (B, H, W) -> regions (B, N, 4) = x0, y0, x1, y1,
 * inclusive pixel indices. bias may be NULL. */
GPSTOKEN_API int gpstoken_partition_cpu(const float* grey, const float* bias, int32_t* regions, int64_t B, int64_t H,
                                        int64_t W, int64_t N, int min_region_size, double entropy_exponent,
                                        int num_threads);

/* The partition by error, see ops/partition_error_reference.py: image (B, C, H, W) float32 in [-1, 1], bias (B, H, W)
 * or NULL -> regions (B, N, 4). */
GPSTOKEN_API int gpstoken_partition_error_cpu(const float* image, const float* bias, int32_t* regions, int64_t B,
                                              int64_t C, int64_t H, int64_t W, int64_t N, int min_region_size,
                                              int num_threads);

/* How many regions' complexities gpstoken_partition_cpu has measured in this process so far: a partition's work. */
GPSTOKEN_API int64_t gpstoken_partition_evaluations_cpu(void);

/* RoIAlign as ops/roi_align.py defines it: features (B, H, W, C) and regions (B, N, 4) = x0, y0, x1, y1, in units of
 * 1 / scale pixels and finite -> cells (B, N, C, bins, bins). features, cells and their gradients have the element type
 * `dtype`. */
GPSTOKEN_API int gpstoken_roi_align_cpu(const void* features, const float* regions, void* cells, int64_t B, int64_t H,
                                        int64_t W, int64_t C, int64_t N, int64_t bins, float scale, int dtype,
                                        int num_threads);

GPSTOKEN_API int gpstoken_roi_align_backward_cpu(const float* regions, const void* grad_cells, void* grad_features,
                                                 int64_t B, int64_t H, int64_t W, int64_t C, int64_t N, int64_t bins,
                                                 float scale, int dtype, int num_threads);

/* Normalisation of channel-last maps, with SiLU behind it if `silu`. x, out, grad_out and grad_x have the element type
 * `dtype`; weight, bias (C), their gradients and all statistics are float32. See ops/norm_reference.py. */

/* Over the channels of each of P pixels: x (P, C). */
GPSTOKEN_API int gpstoken_pixel_norm_cpu(const void* x, const float* weight, const float* bias, void* out, int64_t P,
                                         int64_t C, float eps, int silu, int dtype, int num_threads);

GPSTOKEN_API int gpstoken_pixel_norm_backward_cpu(const void* x, const float* weight, const float* bias,
                                                  const void* grad_out, void* grad_x, float* grad_weight,
                                                  float* grad_bias, int64_t P, int64_t C, float eps, int silu,
                                                  int dtype, int num_threads);

/* x (B, H, W, C) -> mean and biased variance (B, G, rows, cols) of each of G groups of channels in each of rows x cols
 * tiles; they divide H and W. */
GPSTOKEN_API int gpstoken_group_statistics_cpu(const void* x, float* mean, float* variance, int64_t B, int64_t H,
                                               int64_t W, int64_t C, int64_t G, int64_t rows, int64_t cols, int dtype,
                                               int num_threads);

/* out = (x - mean) * inverse_std * weight + bias with mean and inverse_std (B, G). */
GPSTOKEN_API int gpstoken_group_norm_cpu(const void* x, const float* mean, const float* inverse_std,
                                         const float* weight, const float* bias, void* out, int64_t B, int64_t H,
                                         int64_t W, int64_t C, int64_t G, int silu, int dtype, int num_threads);

/* out = (x - mean) / (max(std, floor) + eps) * weight + bias with floor (B, G) and mean and std (B, H, cols, G),
 * between whose columns tiles and shares (W, 4) interpolate: which four count for a column of pixels, and how much. */
GPSTOKEN_API int gpstoken_tile_norm_cpu(const void* x, const float* mean, const float* std, const float* floor,
                                        const int32_t* tiles, const float* shares, const float* weight,
                                        const float* bias, void* out, int64_t B, int64_t H, int64_t W, int64_t C,
                                        int64_t G, int64_t cols, float eps, int silu, int dtype, int num_threads);

/* slope (B, G): the derivative of inverse_std by the variance; mean and variance are those of x. */
GPSTOKEN_API int gpstoken_group_norm_backward_cpu(const void* x, const float* mean, const float* inverse_std,
                                                  const float* slope, const float* weight, const float* bias,
                                                  const void* grad_out, void* grad_x, float* grad_weight,
                                                  float* grad_bias, int64_t B, int64_t H, int64_t W, int64_t C,
                                                  int64_t G, int silu, int dtype, int num_threads);

/* ---- libgpstoken_cuda: device pointers of the current device, work queued on `stream` (a cudaStream_t) ---- */

GPSTOKEN_API int gpstoken_splat_forward_cuda(const float* geometry, const void* texture, void* out, int64_t B,
                                             int64_t N, int64_t C, int64_t H, int64_t W, float support, int dtype,
                                             void* stream);

GPSTOKEN_API int gpstoken_splat_backward_cuda(const float* geometry, const void* texture, const void* grad_out,
                                              float* grad_geometry, void* grad_texture, int64_t B, int64_t N, int64_t C,
                                              int64_t H, int64_t W, float support, int dtype, void* stream);

/* Partition: the regions of gpstoken_partition_cpu, and complexity (B, N), that of each region, unless NULL.
 * terms: what gpstoken_partition_terms_cuda fills in (in host memory, 4097 doubles), copied to the device.
 * scratch: as many bytes of device memory as gpstoken_partition_scratch_cuda says, aligned to 16. It may be freed or
 * used again by whatever is queued on the stream later. */
GPSTOKEN_API int gpstoken_partition_terms_cuda(double* terms);

GPSTOKEN_API int gpstoken_partition_scratch_cuda(int64_t B, int64_t H, int64_t W, int64_t N, int min_region_size,
                                                 int biased, int64_t* bytes);

GPSTOKEN_API int gpstoken_partition_cuda(const float* grey, const float* bias, const double* terms, void* scratch,
                                         int32_t* regions, double* complexity, int64_t B, int64_t H, int64_t W,
                                         int64_t N, int min_region_size, double entropy_exponent, void* stream);

/* The CUDA runtime's words for code - GPSTOKEN_CUDA_ERROR. */
GPSTOKEN_API const char* gpstoken_cuda_error_string(int code);

/* ---- libgpstoken_nvrtc: the functions of libgpstoken_cuda; its kernels are compiled by the caller, with NVRTC ----
 *
 * A launcher queues one kernel and returns 0, or else why not is for the caller to remember: functions then return
 * GPSTOKEN_CUDA_ERROR, as they do without a launcher. source: the file of csrc that defines the kernel, name: a C++
 * expression that names it; arguments: its only parameter, of `bytes` bytes. */
typedef int (*gpstoken_launcher)(const char* source, const char* name, unsigned blocks, unsigned threads, void* stream,
                                 const void* arguments, unsigned bytes);

GPSTOKEN_API void gpstoken_set_launcher(gpstoken_launcher launcher);

#ifdef __cplusplus
}
#endif

#endif /* GPSTOKEN_NATIVE_H */
