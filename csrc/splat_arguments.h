// What the host has to know of the CUDA splatting kernels: element types, sizes of blocks, arguments.
//
// Nothing here belongs to the device, so a compiler that knows no CUDA takes it (nvrtc_launch.h).
#pragma once

namespace gpstoken {
namespace cuda {

constexpr int kWarpSize = 32;

// The two 16-bit element types as torch stores them.
struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// ---- forward ----

constexpr int kForwardThreads = 128;
constexpr int kTileWidth = 16;
constexpr int kTileHeight = 16;

struct SplatForward {
    const float* geometry;  // (batch, tokens, 5)
    const void* texture;    // (batch, tokens, channels)
    void* out;              // (batch, channels, height, width)
    int tokens, channels, height, width;
    float support;  // half a box in sigmas
    int tiles_x, tiles_y, slices;
};

// ---- backward ----

constexpr int kBackwardWarps = 8;
constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;

struct SplatBackward {
    const float* geometry;  // (batch, tokens, 5)
    const void* texture;    // (batch, tokens, channels)
    const void* grad_out;   // (batch, channels, height, width)
    float* grad_geometry;   // (batch, tokens, 5)
    void* grad_texture;     // (batch, tokens, channels)
    long long total;        // batch * tokens
    int tokens, channels, height, width;
    float support;
    int tokens_per_block;  // 1..kBackwardWarps
};

}  // namespace cuda
}  // namespace gpstoken
