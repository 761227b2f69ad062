// The backward kernel of splatting: the gradient of a map to gradients of tokens.
//
// A warp walks the box of one token, row by row, a pixel per lane, and sums the gradient of 4 to 32 channels of
// texture and five moments of the geometry (splat.h) in registers; shuffles add the lanes at the end. More channels
// are further walks: the moments are linear in them. A token whose box holds more than kAlonePixels is walked by all
// eight warps of the block together, and their sums are added in the order of warps. Which of the two it is depends
// on the token alone, so the bits of a gradient do not depend on batch or grid.
#pragma once

#include "splat_device.cuh"

namespace gpstoken {
namespace cuda {

constexpr int kAlonePixels = 256;
constexpr int kMoments = 8;  // five, padded to a power of two for reduce()

template <int kChannels>
struct BackwardShared {
    Quad texture[kBackwardWarps][kChannels / 4];
    float partial[kBackwardWarps][kChannels > kMoments ? kChannels : kMoments];
    bool crowded[kBackwardWarps];  // tokens left to the whole block
};

// Pixels first..last of an axis that may lie within half_width of center: all that do, rarely one more on a side.
// Empty (last < first) if center or half_width is NaN.
__device__ __forceinline__ void candidate_pixels(const Axis& axis, float center, float half_width, int* first,
                                                 int* last) {
    *first = 0;
    *last = -1;
    if (!(center - half_width <= 1.0f && center + half_width >= -1.0f)) return;
    const float slack = 1e-6f * axis.last * (2.0f + fabsf(center) + half_width);  // of a few float32 roundings
    const float low = (center - half_width + 1.0f) * (0.5f * axis.last) - slack;
    const float high = (center + half_width + 1.0f) * (0.5f * axis.last) + slack;
    *first = static_cast<int>(fminf(fmaxf(ceilf(low), 0.0f), axis.last));
    *last = static_cast<int>(fmaxf(fminf(floorf(high), axis.last), -1.0f));
}

// Sums value[i] over the 32 lanes, in a fixed order, for a power of two of values up to 32: lane l returns the sum of
// value[l / (32 / kValues)]. Each exchange halves what a lane still has to carry: 31 shuffles for 32 values.
template <int kValues, int kDistance = kWarpSize / 2>
__device__ __forceinline__ float reduce(const float (&value)[kValues], int lane) {
    if constexpr (kDistance == 0) {
        return value[0];
    } else if constexpr (kValues == 1) {
        const float sum[1] = {value[0] + __shfl_xor_sync(kAllLanes, value[0], kDistance)};
        return reduce<1, kDistance / 2>(sum, lane);
    } else {
        const bool upper = (lane & kDistance) != 0;
        float half[kValues / 2];
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i) {
            const float sent = upper ? value[i] : value[i + kValues / 2];
            const float own = upper ? value[i + kValues / 2] : value[i];
            half[i] = own + __shfl_xor_sync(kAllLanes, sent, kDistance);
        }
        return reduce<kValues / 2, kDistance / 2>(half, lane);
    }
}

// What walking a box gathers in one lane.
template <int kChannels>
struct BoxSums {
    float texture[kChannels];
    Moments moments;
};

// Pixels number `start`, start + stride, ... of the box of g; grad points to the image's first channel of the slice.
// kWhole: the slice has all kChannels channels, else the first `channels` of them.
template <class T, int kChannels, bool kWhole>
__device__ __forceinline__ void walk_box(const Gaussian& g, float half_x, float half_y, const Axis& columns,
                                         const Axis& rows, const Quad* texture, const T* grad, long long plane,
                                         int width, int channels, int start, int stride, BoxSums<kChannels>& sums) {
    const int box_width = g.x1 - g.x0 + 1;
    const int stride_y = stride / box_width;
    const int stride_x = stride - stride_y * box_width;
    int y = g.y0 + start / box_width;
    int x = g.x0 + start % box_width;
    while (y <= g.y1) {
        const float dx = columns.center(x) - g.x;
        const float dy = rows.center(y) - g.y;
        if (fabsf(dx) <= half_x && fabsf(dy) <= half_y) {
            const float v = dy * g.inv_sigma_y;
            const float q = g.k * fmaf(-g.rho, v, dx * g.inv_sigma_x);
            const float weight = power_of_two(-0.72134752044448170368f * fmaf(q, q, v * v));  // log2(e) / 2
            const T* source = grad + static_cast<long long>(y) * width + x;
            float value[kChannels];
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                value[c] = kWhole || c < channels ? load(source) : 0.0f;
                source += plane;
            }
            float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int c = 0; c < kChannels / 4; ++c) {
                const Quad quad = texture[c];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    product[i] = fmaf(quad.value[i], value[4 * c + i], product[i]);
                    sums.texture[4 * c + i] = fmaf(weight, value[4 * c + i], sums.texture[4 * c + i]);
                }
            }
            const float s = weight * ((product[0] + product[1]) + (product[2] + product[3]));
            const float sq = s * q, sv = s * v;
            sums.moments.q += sq;
            sums.moments.v += sv;
            sums.moments.qq = fmaf(sq, q, sums.moments.qq);
            sums.moments.qv = fmaf(sq, v, sums.moments.qv);
            sums.moments.vv = fmaf(sv, v, sums.moments.vv);
        }
        x += stride_x;
        y += stride_y;
        if (x > g.x1) {
            x -= box_width;
            ++y;
        }
    }
}

// Both gradients of token number `item` of the batch, by kTeam warps: the calling one, or all of the block.
template <class T, int kChannels, int kTeam>
__device__ __forceinline__ void splat_backward_token(const SplatBackward& args, BackwardShared<kChannels>& shared,
                                                     const Axis& columns, const Axis& rows, const Token& token,
                                                     const Gaussian& g, long long item) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int first_warp = kTeam == 1 ? warp : 0;
    const int member = static_cast<int>(threadIdx.x) - first_warp * kWarpSize;  // number in the team
    const auto barrier = [] {
        if (kTeam == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    };
    const long long plane = static_cast<long long>(args.height) * args.width;
    const T* const texture = static_cast<const T*>(args.texture) + item * args.channels;
    const T* const grad_out = static_cast<const T*>(args.grad_out) + item / args.tokens * args.channels * plane;
    T* const grad_texture = static_cast<T*>(args.grad_texture) + item * args.channels;
    const float half_x = args.support * token.sigma_x, half_y = args.support * token.sigma_y;

    BoxSums<kChannels> sums;
    sums.moments = Moments{0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = 0; first < args.channels; first += kChannels) {
        const int channels = min(kChannels, args.channels - first);
        if (lane < kChannels)
            shared.texture[warp][lane / 4].value[lane % 4] = lane < channels ? load(texture + first + lane) : 0.0f;
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums.texture[c] = 0.0f;
        const T* const slice = grad_out + first * plane;
        if (!g.empty()) {
            if (channels == kChannels) {
                walk_box<T, kChannels, true>(g, half_x, half_y, columns, rows, shared.texture[warp], slice, plane,
                                             args.width, channels, member, kTeam * kWarpSize, sums);
            } else {
                walk_box<T, kChannels, false>(g, half_x, half_y, columns, rows, shared.texture[warp], slice, plane,
                                              args.width, channels, member, kTeam * kWarpSize, sums);
            }
        }
        __syncwarp();
        const float total = reduce(sums.texture, lane);
        constexpr int kLanesPerChannel = kWarpSize / kChannels;
        if (lane % kLanesPerChannel == 0) shared.partial[warp][lane / kLanesPerChannel] = total;
        barrier();
        if (member < channels) {
            float channel = shared.partial[first_warp][member];
            for (int w = 1; w < kTeam; ++w) channel += shared.partial[w][member];
            store(grad_texture + first + member, channel);
        }
        barrier();
    }

    float moment[kMoments] = {
        sums.moments.q, sums.moments.v, sums.moments.qq, sums.moments.qv, sums.moments.vv, 0.0f, 0.0f, 0.0f};
    const float total = reduce(moment, lane);
    constexpr int kLanesPerMoment = kWarpSize / kMoments;
    if (lane % kLanesPerMoment == 0) shared.partial[warp][lane / kLanesPerMoment] = total;
    barrier();
    if (member == 0) {
        float* const grad_geometry = args.grad_geometry + item * 5;
        if (g.empty()) {
            for (int i = 0; i < 5; ++i) grad_geometry[i] = 0.0f;
        } else {
            float m[5];
#pragma unroll
            for (int i = 0; i < 5; ++i) {
                m[i] = shared.partial[first_warp][i];
                for (int w = 1; w < kTeam; ++w) m[i] += shared.partial[w][i];
            }
            write_geometry_gradient(g, Moments{m[0], m[1], m[2], m[3], m[4]}, grad_geometry);
        }
    }
    barrier();
}

template <class T, int kChannels>
__device__ __forceinline__ void splat_backward_block(const SplatBackward& args, BackwardShared<kChannels>& shared) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const long long first = static_cast<long long>(blockIdx.x) * args.tokens_per_block;
    const Axis columns(args.width), rows(args.height);

    const auto prepare = [&](const Token& token) {
        Gaussian g = {token.x, token.y, 0.0f, 0.0f, token.rho, 0.0f, 0, -1, 0, -1};
        if (!token.paints()) return g;
        g.inv_sigma_x = 1.0f / token.sigma_x;
        g.inv_sigma_y = 1.0f / token.sigma_y;
        g.k = 1.0f / sqrtf((1.0f - token.rho) * (1.0f + token.rho));
        candidate_pixels(columns, token.x, args.support * token.sigma_x, &g.x0, &g.x1);
        candidate_pixels(rows, token.y, args.support * token.sigma_y, &g.y0, &g.y1);
        return g;
    };

    if (lane == 0) shared.crowded[warp] = false;
    const long long own = first + warp;
    if (warp < args.tokens_per_block && own < args.total) {
        const Token token(args.geometry + own * 5);
        const Gaussian g = prepare(token);
        const bool crowded = !g.empty() && static_cast<long long>(g.x1 - g.x0 + 1) * (g.y1 - g.y0 + 1) > kAlonePixels;
        if (crowded) {
            if (lane == 0) shared.crowded[warp] = true;
        } else {
            splat_backward_token<T, kChannels, 1>(args, shared, columns, rows, token, g, own);
        }
    }
    __syncthreads();
    for (int i = 0; i < args.tokens_per_block; ++i) {
        if (!shared.crowded[i]) continue;
        const Token token(args.geometry + (first + i) * 5);
        splat_backward_token<T, kChannels, kBackwardWarps>(args, shared, columns, rows, token, prepare(token),
                                                           first + i);
    }
}

// No number of blocks to aim at: told one, the compiler keeps more loads in flight than it has registers, and spills.
template <class T, int kChannels>
__global__ void __launch_bounds__(kBackwardThreads) splat_backward_kernel(const SplatBackward args) {
    GPSTOKEN_SHARED(BackwardShared<kChannels>, shared);
    splat_backward_block<T, kChannels>(args, shared);
}

}  // namespace cuda
}  // namespace gpstoken
