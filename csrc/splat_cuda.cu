// Host side of the CUDA splatting kernels: checks, grid, launch. The C interface is described in gpstoken_native.h.

#include "cuda_launch.h"
#include "gpstoken_native.h"
#include "splat_arguments.h"
#if !defined(GPSTOKEN_NVRTC)
#include "splat_backward.cuh"
#include "splat_forward.cuh"
#endif

namespace {

using namespace gpstoken::cuda;

constexpr int64_t kLargestAxis = 1 << 23;  // pixel coordinates are exact float32 quotients up to here

// Blocks that fill today's largest GPUs about once; below this more, smaller blocks are worth repeated culling.
constexpr int64_t kManyBlocks = 256;
// Tokens in a batch below which each gets a block of its own, so that all multiprocessors take part.
constexpr int64_t kFewTokens = 1024;

// Sizes that kernels may index with int, and a product of all that fits int64.
bool legal(int64_t B, int64_t N, int64_t C, int64_t H, int64_t W) {
    const int64_t largest = kLargestGrid - 4096;
    return B >= 0 && N >= 0 && C >= 0 && H >= 0 && W >= 0 && N <= largest && C <= largest && H <= kLargestAxis &&
           W <= kLargestAxis;
}

template <class T, int kChannels>
int launch_forward(SplatForward args, int64_t batch, cudaStream_t stream) {
    args.slices = static_cast<int>(ceil_div(args.channels, kChannels));
    const int64_t blocks = batch * args.tiles_x * args.tiles_y * args.slices;
    return launch(splat_forward_kernel<T, kChannels>, blocks, kForwardThreads, stream, args);
}

template <class T>
int splat_forward(const SplatForward& args, int64_t batch, cudaStream_t stream) {
    // The slice of channels changes who computes a sum, never its order: results do not depend on this choice.
    const int64_t tiles = batch * args.tiles_x * args.tiles_y;
    const auto fills = [&](int channels) { return tiles * ceil_div(args.channels, channels) >= kManyBlocks; };
    if (args.channels <= 4) return launch_forward<T, 4>(args, batch, stream);
    if (args.channels <= 8 || !fills(16)) return launch_forward<T, 8>(args, batch, stream);
    if (args.channels <= 16 || !fills(32)) return launch_forward<T, 16>(args, batch, stream);
    return launch_forward<T, 32>(args, batch, stream);
}

template <class T, int kChannels>
int launch_backward(const SplatBackward& args, cudaStream_t stream) {
    const int64_t blocks = ceil_div(args.total, args.tokens_per_block);
    return launch(splat_backward_kernel<T, kChannels>, blocks, kBackwardThreads, stream, args);
}

template <class T>
int splat_backward(const SplatBackward& args, cudaStream_t stream) {
    if (args.channels <= 4) return launch_backward<T, 4>(args, stream);
    if (args.channels <= 8) return launch_backward<T, 8>(args, stream);
    if (args.channels <= 16) return launch_backward<T, 16>(args, stream);
    return launch_backward<T, 32>(args, stream);
}

}  // namespace

extern "C" {

int gpstoken_abi_version(void) { return GPSTOKEN_ABI_VERSION; }

int gpstoken_splat_forward_cuda(const float* geometry, const void* texture, void* out, int64_t B, int64_t N, int64_t C,
                                int64_t H, int64_t W, float support, int dtype, void* stream) {
    if (!legal(B, N, C, H, W)) return GPSTOKEN_INVALID_ARGUMENT;
    if (B == 0 || C == 0 || H == 0 || W == 0) return GPSTOKEN_OK;
    SplatForward args = {};
    args.geometry = geometry;
    args.texture = texture;
    args.out = out;
    args.tokens = static_cast<int>(N);
    args.channels = static_cast<int>(C);
    args.height = static_cast<int>(H);
    args.width = static_cast<int>(W);
    args.support = support;
    args.tiles_x = static_cast<int>(ceil_div(W, kTileWidth));
    args.tiles_y = static_cast<int>(ceil_div(H, kTileHeight));
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case GPSTOKEN_FLOAT32:
            return splat_forward<float>(args, B, queue);
        case GPSTOKEN_FLOAT16:
            return splat_forward<Float16>(args, B, queue);
        case GPSTOKEN_BFLOAT16:
            return splat_forward<BFloat16>(args, B, queue);
        default:
            return GPSTOKEN_UNSUPPORTED_DTYPE;
    }
}

int gpstoken_splat_backward_cuda(const float* geometry, const void* texture, const void* grad_out, float* grad_geometry,
                                 void* grad_texture, int64_t B, int64_t N, int64_t C, int64_t H, int64_t W,
                                 float support, int dtype, void* stream) {
    if (!legal(B, N, C, H, W)) return GPSTOKEN_INVALID_ARGUMENT;
    if (B == 0 || N == 0) return GPSTOKEN_OK;
    SplatBackward args = {};
    args.geometry = geometry;
    args.texture = texture;
    args.grad_out = grad_out;
    args.grad_geometry = grad_geometry;
    args.grad_texture = grad_texture;
    args.total = B * N;
    args.tokens = static_cast<int>(N);
    args.channels = static_cast<int>(C);
    args.height = static_cast<int>(H);
    args.width = static_cast<int>(W);
    args.support = support;
    args.tokens_per_block = args.total <= kFewTokens ? 1 : kBackwardWarps;
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case GPSTOKEN_FLOAT32:
            return splat_backward<float>(args, queue);
        case GPSTOKEN_FLOAT16:
            return splat_backward<Float16>(args, queue);
        case GPSTOKEN_BFLOAT16:
            return splat_backward<BFloat16>(args, queue);
        default:
            return GPSTOKEN_UNSUPPORTED_DTYPE;
    }
}

const char* gpstoken_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // extern "C"
