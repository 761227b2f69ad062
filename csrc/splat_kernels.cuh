// The CUDA kernels of splatting: bodies and entry points, and nothing of the host.
//
// nvcc, NVRTC and a plain C++17 compiler (tests/emulation stands in for blocks, warps and barriers) take this file as
// it is. The formulas are those of splat.h. What differs here is rounding policy: a GPU for the
// desk has one double unit for 64 floats, so pixel coordinates and box ranges are found in float32, to the same bits.
//
// Both kernels gather: every output element is summed by one thread group in one fixed order and written once. There
// are no atomics, no workspace, and a result never depends on the batch that an image is part of.
#pragma once

#include "splat.h"

namespace gpstoken {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// ---- Element types: float, and the two 16-bit ones as torch stores them ----

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float load(const float* source) { return *source; }

__device__ __forceinline__ float load(const Float16* source) {
#if defined(__CUDACC__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(source->bits));
    return value;
#else
    return __half2float_bits(source->bits);
#endif
}

__device__ __forceinline__ float load(const BFloat16* source) {
    return __uint_as_float(static_cast<unsigned>(source->bits) << 16);
}

__device__ __forceinline__ void store(float* target, float value) { *target = value; }

__device__ __forceinline__ void store(Float16* target, float value) {
#if defined(__CUDACC__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target->bits) : "f"(value));
#else
    target->bits = __float2half_bits(value);
#endif
}

// To nearest, ties to even. Integer arithmetic, because the instruction is missing before sm_80.
__device__ __forceinline__ void store(BFloat16* target, float value) {
    const unsigned bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target->bits = static_cast<unsigned short>(is_nan ? 0x7fc0u : rounded);
}

// 2^x, to 2 ulp; 0 below the normal numbers, where exp2f() spends three more instructions.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDACC__)
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return exp2f(x);
#endif
}

// ---- Pixel coordinates ----

// Coordinates of the samples of one axis. center(i) is the correctly rounded quotient (2 i - (n - 1)) / (n - 1): one
// step of Newton's correction after the product with the reciprocal gives the very bits of the division (Markstein
// 1990), for a third of its price.
struct Axis {
    float last;        // n - 1
    float reciprocal;  // 1 / (n - 1)

    __device__ __forceinline__ explicit Axis(int n)
        : last(static_cast<float>(n - 1)), reciprocal(n > 1 ? 1.0f / static_cast<float>(n - 1) : 0.0f) {}

    __device__ __forceinline__ float center(int i) const {
        const float numerator = fmaf(2.0f, static_cast<float>(i), -last);  // exact below 2^23 samples
        const float quotient = numerator * reciprocal;
        return fmaf(fmaf(-quotient, last, numerator), reciprocal, quotient);
    }
};

// The five numbers of one token.
struct Token {
    float sigma_x, sigma_y, rho, x, y;

    __device__ __forceinline__ explicit Token(const float* geometry)
        : sigma_x(geometry[0]), sigma_y(geometry[1]), rho(geometry[2]), x(geometry[3]), y(geometry[4]) {}

    // Whether it paints at all: the rule of splat.h, false for every NaN.
    __device__ __forceinline__ bool paints() const {
        return sigma_x >= FLT_MIN && sigma_x <= FLT_MAX && sigma_y >= FLT_MIN && sigma_y <= FLT_MAX &&
               fabsf(rho) < 1.0f && fabsf(x) <= FLT_MAX && fabsf(y) <= FLT_MAX;
    }
};

// Whether any coordinate in low..high passes |coordinate - center| <= half_width. Float subtraction is monotone, so
// with low and high themselves pixel centres this is exactly what testing each pixel between them would say.
__device__ __forceinline__ bool reaches(float center, float half_width, float low, float high) {
    return low - center <= half_width && center - high <= half_width;
}

// ---- Forward ----
//
// A block paints a tile of 16 x 16 pixels, 4 to 32 channels of it: four warps of 16 x 4 pixels, two pixels (y and
// y + 2) and all the channels per thread, in registers. All threads first test tokens against the tile, 128 at a
// time; ballots give each survivor its place, so that the list keeps the order of tokens and with it the order of
// summation. Survivors are staged in shared memory, 64 at a time; each warp passes over those that miss its own
// pixels, 32 per ballot, and adds the others.

constexpr int kForwardThreads = 128;
constexpr int kForwardWarps = kForwardThreads / kWarpSize;
constexpr int kTileWidth = 16;
constexpr int kTileHeight = 16;
constexpr int kRowsPerWarp = kTileHeight / kForwardWarps;
constexpr int kRowsPerStep = kWarpSize / kTileWidth;  // rows that a warp covers with one pixel per lane
constexpr int kPixelsPerThread = kRowsPerWarp / kRowsPerStep;
constexpr int kStaged = 64;
constexpr int kWaiting = 4 * kForwardThreads;

struct SplatForward {
    const float* geometry;  // (batch, tokens, 5)
    const void* texture;    // (batch, tokens, channels)
    void* out;              // (batch, channels, height, width)
    int tokens, channels, height, width;
    float support;  // half a box in sigmas
    int tiles_x, tiles_y, slices;
};

// One survivor, ready to be evaluated: weight = 2^-(k2 (u - rho v)^2 + v^2), u = dx inv_x, v = dy inv_y.
struct alignas(16) StagedToken {
    float x, y, half_x, half_y;
    float inv_x, inv_y;  // sqrt(log2(e) / 2) / sigma
    float rho, k2;       // k2 = 1 / (1 - rho^2)
};

struct alignas(16) Quad {
    float value[4];
};

template <int kChannels>
struct ForwardShared {
    StagedToken token[kStaged];
    Quad texture[kStaged][kChannels / 4];
    int waiting[kWaiting];              // indices of survivors, in rising order
    int survivors[2][kForwardWarps];    // per warp; two sets, so that one barrier a round is enough
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

// ---- Backward ----
//
// A warp walks the box of one token, row by row, a pixel per lane, and sums the gradient of 4 to 32 channels of
// texture and five moments of the geometry (splat.h) in registers; shuffles add the lanes at the end. More channels
// are further walks: the moments are linear in them. A token whose box holds more than kAlonePixels is walked by all
// eight warps of the block together, and their sums are added in the order of warps. Which of the two it is depends
// on the token alone, so the bits of a gradient do not depend on batch or grid.

constexpr int kBackwardWarps = 8;
constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;
constexpr int kAlonePixels = 256;
constexpr int kMoments = 8;  // five, padded to a power of two for reduce()

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

    float moment[kMoments] = {sums.moments.q,  sums.moments.v,  sums.moments.qq, sums.moments.qv,
                              sums.moments.vv, 0.0f,            0.0f,            0.0f};
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
        const bool crowded =
            !g.empty() && static_cast<long long>(g.x1 - g.x0 + 1) * (g.y1 - g.y0 + 1) > kAlonePixels;
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

// ---- Entry points ----

// One variable per block in shared memory; the host emulation has its own.
#if !defined(GPSTOKEN_SHARED)
#define GPSTOKEN_SHARED(Type, name) __shared__ Type name
#endif

// Blocks per multiprocessor to leave registers for: as many as do without spills.
template <int kChannels>
constexpr int kForwardBlocks = kChannels == 32 ? 4 : kChannels == 16 ? 5 : 6;

template <class T, int kChannels>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<kChannels>)
    splat_forward_kernel(const SplatForward args) {
    GPSTOKEN_SHARED(ForwardShared<kChannels>, shared);
    splat_forward_block<T, kChannels>(args, shared);
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kBackwardThreads) splat_backward_kernel(const SplatBackward args) {
    GPSTOKEN_SHARED(BackwardShared<kChannels>, shared);
    splat_backward_block<T, kChannels>(args, shared);
}

}  // namespace cuda
}  // namespace gpstoken
