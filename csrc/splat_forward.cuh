// The forward kernel of splatting: tokens to a map.
//
// A block paints a tile of 16 x 16 pixels, 4 to 32 channels of it: four warps of 16 x 4 pixels, two pixels (y and
// y + 2) and all the channels per thread, in registers. All threads first test tokens against the tile, 128 at a
// time; ballots give each survivor its place, so that the list keeps the order of tokens and with it the order of
// summation. Survivors are staged in shared memory, 64 at a time; each warp passes over those that miss its own
// pixels, 32 per ballot, and adds the others.
#pragma once

#include "splat_device.cuh"

namespace gpstoken {
namespace cuda {

constexpr int kForwardWarps = kForwardThreads / kWarpSize;
constexpr int kRowsPerWarp = kTileHeight / kForwardWarps;
constexpr int kRowsPerStep = kWarpSize / kTileWidth;  // rows that a warp covers with one pixel per lane
constexpr int kPixelsPerThread = kRowsPerWarp / kRowsPerStep;
constexpr int kStaged = 64;
constexpr int kWaiting = 4 * kForwardThreads;

// One survivor, ready to be evaluated: weight = 2^-(k2 (u - rho v)^2 + v^2), u = dx inv_x, v = dy inv_y.
struct alignas(16) StagedToken {
    float x, y, half_x, half_y;
    float inv_x, inv_y;  // sqrt(log2(e) / 2) / sigma
    float rho, k2;       // k2 = 1 / (1 - rho^2)
};

template <int kChannels>
struct ForwardShared {
    StagedToken token[kStaged];
    Quad texture[kStaged][kChannels / 4];
    int waiting[kWaiting];            // indices of survivors, in rising order
    int survivors[2][kForwardWarps];  // per warp; two sets, so that one barrier a round is enough
};

__device__ __forceinline__ StagedToken stage(const Token& token, float support) {
    const float root = 0.84932180028801904272f;  // sqrt(log2(e) / 2)
    StagedToken staged;
    staged.x = token.x;
    staged.y = token.y;
    staged.half_x = support * token.sigma_x;
    staged.half_y = support * token.sigma_y;
    staged.inv_x = root / token.sigma_x;
    staged.inv_y = root / token.sigma_y;
    staged.rho = token.rho;
    staged.k2 = 1.0f / ((1.0f - token.rho) * (1.0f + token.rho));
    return staged;
}

template <class T, int kChannels>
__device__ __forceinline__ void splat_forward_block(const SplatForward& args, ForwardShared<kChannels>& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpSize;
    const int warp = thread / kWarpSize;

    // Block -> image, tile, slice of channels; the slices of a tile are neighbours and share its geometry in cache.
    int block = static_cast<int>(blockIdx.x);
    const int first_channel = block % args.slices * kChannels;
    block /= args.slices;
    const int tile_x = block % args.tiles_x * kTileWidth;
    block /= args.tiles_x;
    const int tile_y = block % args.tiles_y * kTileHeight;
    const long long image = block / args.tiles_y;
    const float* const geometry = args.geometry + image * args.tokens * 5;
    const T* const texture = static_cast<const T*>(args.texture) + image * args.tokens * args.channels + first_channel;
    const int channels = min(kChannels, args.channels - first_channel);

    // This thread's pixels, and what its warp and its block cover. Centres rise with the index, so the first and the
    // last bound all others.
    const Axis columns(args.width), rows(args.height);
    const int x = tile_x + lane % kTileWidth;
    const int warp_y = tile_y + warp * kRowsPerWarp;
    const int y = warp_y + lane / kTileWidth;
    const float center_x = columns.center(x);
    float center_y[kPixelsPerThread];
#pragma unroll
    for (int p = 0; p < kPixelsPerThread; ++p) center_y[p] = rows.center(y + p * kRowsPerStep);
    const float left = columns.center(tile_x);
    const float right = columns.center(min(tile_x + kTileWidth, args.width) - 1);
    const float top = rows.center(tile_y);
    const float bottom = rows.center(min(tile_y + kTileHeight, args.height) - 1);
    const float warp_top = rows.center(warp_y);
    const float warp_bottom = rows.center(min(warp_y + kRowsPerWarp, args.height) - 1);
    const bool warp_in_image = warp_y < args.height;

    float sum[kPixelsPerThread][kChannels];
#pragma unroll
    for (int p = 0; p < kPixelsPerThread; ++p)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[p][c] = 0.0f;

    int waiting = 0;
    int round = 0;
    for (int start = 0; start < args.tokens; start += kForwardThreads, ++round) {
        // Cull: one token per thread.
        const int index = start + thread;
        bool survives = false;
        if (index < args.tokens) {
            const Token token(geometry + static_cast<long long>(index) * 5);
            survives = token.paints() && reaches(token.x, args.support * token.sigma_x, left, right) &&
                       reaches(token.y, args.support * token.sigma_y, top, bottom);
        }
        const unsigned ballot = __ballot_sync(kAllLanes, survives);
        int* const survivors = shared.survivors[round & 1];
        if (lane == 0) survivors[warp] = __popc(ballot);
        __syncthreads();
        int place = waiting + __popc(ballot & ((1u << lane) - 1u));
#pragma unroll
        for (int w = 0; w < kForwardWarps; ++w) {
            const int count = survivors[w];
            waiting += count;
            if (w < warp) place += count;
        }
        if (survives) shared.waiting[place] = index;

        // Go on while another round surely fits and there is one.
        if (waiting <= kWaiting - kForwardThreads && start + kForwardThreads < args.tokens) continue;
        __syncthreads();
        for (int done = 0; done < waiting; done += kStaged) {
            const int count = min(kStaged, waiting - done);
            if (thread < count) {
                const long long survivor = shared.waiting[done + thread];
                shared.token[thread] = stage(Token(geometry + survivor * 5), args.support);
            }
            for (int i = thread; i < count * kChannels; i += kForwardThreads) {
                const int channel = i % kChannels;
                const long long survivor = shared.waiting[done + i / kChannels];
                shared.texture[i / kChannels][channel / 4].value[channel % 4] =
                    channel < channels ? load(texture + survivor * args.channels + channel) : 0.0f;
            }
            __syncthreads();
            for (int group = 0; group < count; group += kWarpSize) {
                bool touches = false;
                if (warp_in_image && group + lane < count) {
                    const StagedToken token = shared.token[group + lane];
                    touches = reaches(token.y, token.half_y, warp_top, warp_bottom);
                }
                for (unsigned rest = __ballot_sync(kAllLanes, touches); rest != 0; rest &= rest - 1) {
                    const int slot = group + __ffs(static_cast<int>(rest)) - 1;
                    const StagedToken token = shared.token[slot];
                    const float dx = center_x - token.x;
                    const float u = dx * token.inv_x;
                    const bool in_columns = fabsf(dx) <= token.half_x;
                    float weight[kPixelsPerThread];
#pragma unroll
                    for (int p = 0; p < kPixelsPerThread; ++p) {
                        const float dy = center_y[p] - token.y;
                        const float v = dy * token.inv_y;
                        const float slant = fmaf(-token.rho, v, u);
                        const float exponent = fmaf(token.k2 * slant, slant, v * v);
                        const float inside = power_of_two(-exponent);  // computed anyway: cheaper than a branch
                        weight[p] = in_columns & (fabsf(dy) <= token.half_y) ? inside : 0.0f;
                    }
#pragma unroll
                    for (int q = 0; q < kChannels / 4; ++q) {
                        const Quad quad = shared.texture[slot][q];
#pragma unroll
                        for (int p = 0; p < kPixelsPerThread; ++p)
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                sum[p][4 * q + i] = fmaf(weight[p], quad.value[i], sum[p][4 * q + i]);
                    }
                }
            }
            __syncthreads();
        }
        waiting = 0;
    }

    const long long plane = static_cast<long long>(args.height) * args.width;
    T* const out = static_cast<T*>(args.out) + (image * args.channels + first_channel) * plane;
    if (x < args.width) {
#pragma unroll
        for (int p = 0; p < kPixelsPerThread; ++p) {
            const int row = y + p * kRowsPerStep;
            if (row >= args.height) continue;
            T* target = out + static_cast<long long>(row) * args.width + x;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                if (c < channels) store(target, sum[p][c]);
                target += plane;
            }
        }
    }
}

// Blocks per multiprocessor to leave registers for: as many as do without spills.
template <int kChannels>
constexpr int kForwardBlocks = kChannels == 32   ? 4
                               : kChannels == 16 ? 5
                                                 : 6;

template <class T, int kChannels>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<kChannels>)
    splat_forward_kernel(const SplatForward args) {
    GPSTOKEN_SHARED(ForwardShared<kChannels>, shared);
    splat_forward_block<T, kChannels>(args, shared);
}

}  // namespace cuda
}  // namespace gpstoken
