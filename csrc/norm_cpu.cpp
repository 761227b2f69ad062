// Normalisation of channel-last maps on the CPU, with SiLU behind it: over the channels of each pixel, or over groups
// of channels of a whole image. Threads take blocks of pixels whose sums are added in a fixed order, so that results do
// not depend on the number of threads.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu_buffer.h"
#include "cpu_isa.h"
#include "dtype_dispatch.h"
#include "gpstoken_native.h"
#include "half_types.h"
#include "parallel.h"

namespace gpstoken {
namespace {

// Of each channel over some pixels: how many they are, the mean, the sum of squares around it.
struct Moments {
    double count, *mean, *squares;
};

// ---- one copy of the inner loops per instruction set ----

#define GPSTOKEN_KERNEL_FILE "norm_cpu_kernel.h"
#include "each_isa.h"

template <class T>
struct Kernels {
    decltype(&baseline::pixel_norm_rows<T, true>) pixel_norm_rows;
    decltype(&baseline::pixel_norm_backward_rows<T, true>) pixel_norm_backward_rows;
    decltype(&baseline::add_pixels<T>) add_pixels;
    decltype(&baseline::add_moments) add_moments;
    decltype(&baseline::channel_norm_rows<T, true>) channel_norm_rows;
    decltype(&baseline::tile_norm_row<T, true>) tile_norm_row;
    decltype(&baseline::channel_norm_sums<T, true>) channel_norm_sums;
    decltype(&baseline::channel_norm_backward_rows<T, true>) channel_norm_backward_rows;
};

#define GPSTOKEN_NORM_KERNELS(isa)            \
    {isa::pixel_norm_rows<T, kSilu>,          \
     isa::pixel_norm_backward_rows<T, kSilu>, \
     isa::add_pixels<T>,                      \
     isa::add_moments,                        \
     isa::channel_norm_rows<T, kSilu>,        \
     isa::tile_norm_row<T, kSilu>,            \
     isa::channel_norm_sums<T, kSilu>,        \
     isa::channel_norm_backward_rows<T, kSilu>}

template <class T, bool kSilu>
Kernels<T> best_kernels() {
#if defined(GPSTOKEN_X86_DISPATCH)
    if (best_isa() == Isa::kAvx512) return GPSTOKEN_NORM_KERNELS(avx512);
    if (best_isa() == Isa::kAvx2) return GPSTOKEN_NORM_KERNELS(avx2);
#endif
    return GPSTOKEN_NORM_KERNELS(baseline);
}

template <class T>
Kernels<T> kernels(bool silu) {
    return silu ? best_kernels<T, true>() : best_kernels<T, false>();
}

// ---- blocks of pixels ----

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kPixelsPerBlock = 64;  // of 512 channels: what fits the second-level cache

int64_t blocks_of(int64_t pixels) { return divide_up(pixels, kPixelsPerBlock); }
int64_t block_size(int64_t block, int64_t pixels) {
    return std::min(kPixelsPerBlock, pixels - block * kPixelsPerBlock);
}

// Values per channel, padded with zeros.
Buffer padded_copy(const float* values, int64_t C, int64_t padded) {
    Buffer copy = make_buffer(padded);
    std::copy(values, values + C, copy.get());
    std::fill(copy.get() + C, copy.get() + padded, 0.0f);
    return copy;
}

// ---- over the channels of each pixel ----

template <class T>
void pixel_norm(const T* x, const float* weight, const float* bias, T* out, int64_t P, int64_t C, float eps, bool silu,
                int num_threads) {
    const int64_t padded = round_up(C, kMaxLanes);
    const int threads = useful_threads(P * C, num_threads);
    const Buffer w = padded_copy(weight, C, padded), b = padded_copy(bias, C, padded);
    const auto k = kernels<T>(silu);
    parallel_for(blocks_of(P), threads, [&](int64_t block, int) {
        const int64_t first = block * kPixelsPerBlock * C;
        k.pixel_norm_rows(x + first, w.get(), b.get(), out + first, block_size(block, P), C, eps);
    });
}

template <class T>
void pixel_norm_backward(const T* x, const float* weight, const float* bias, const T* grad_out, T* grad_x,
                         float* grad_weight, float* grad_bias, int64_t P, int64_t C, float eps, bool silu,
                         int num_threads) {
    const int64_t padded = round_up(C, kMaxLanes), blocks = blocks_of(P);
    const int threads = useful_threads(P * C, num_threads);
    const Buffer w = padded_copy(weight, C, padded), b = padded_copy(bias, C, padded);
    const Buffer scratch = make_buffer(threads * 2 * padded), sums = make_buffer(blocks * 2 * padded);
    const auto k = kernels<T>(silu);
    parallel_for(blocks, threads, [&](int64_t block, int worker) {
        const int64_t first = block * kPixelsPerBlock * C;
        float* own = sums.get() + block * 2 * padded;
        std::fill(own, own + 2 * padded, 0.0f);
        k.pixel_norm_backward_rows(x + first, w.get(), b.get(), grad_out + first, grad_x + first, own, own + padded,
                                   block_size(block, P), C, padded, eps, scratch.get() + worker * 2 * padded);
    });
    std::vector<double> totals(static_cast<size_t>(2 * padded), 0.0);
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t i = 0; i < 2 * padded; ++i) totals[i] += sums[block * 2 * padded + i];
    for (int64_t c = 0; c < C; ++c) {
        grad_weight[c] = static_cast<float>(totals[c]);
        grad_bias[c] = static_cast<float>(totals[padded + c]);
    }
}

// ---- over groups of channels ----

struct Sizes {
    int64_t B, H, W, C, G, rows, cols;  // rows x cols tiles
};

// Mean and biased variance of each group in each tile, both (B, G, rows, cols).
template <class T>
void group_statistics(const T* x, float* mean, float* variance, const Sizes& s, int num_threads) {
    // Work for so many threads, but enough blocks in a part to pay for its first, which is read twice.
    constexpr int64_t kPartsPerImage = 32, kBlocksPerPart = 8;
    const int64_t padded = round_up(s.C, kMaxLanes), size = s.C / s.G;
    const int64_t tile_height = s.H / s.rows, tile_width = s.W / s.cols;
    // A tile as wide as the map is one long row of pixels.
    const int64_t lines = s.cols == 1 ? 1 : tile_height, line = tile_height * tile_width / lines;
    const int64_t pieces = blocks_of(line), blocks = lines * pieces, places = s.rows * s.cols, tiles = s.B * places;
    const int64_t parts = std::min(divide_up(blocks, kBlocksPerPart), divide_up(kPartsPerImage, places));
    const int threads = useful_threads(s.B * s.H * s.W * s.C, num_threads);
    std::vector<double> figures(static_cast<size_t>(tiles * parts * 2 * padded), 0.0);
    std::vector<Moments> moments;  // of every part of a tile
    for (double* own = figures.data(); own < figures.data() + figures.size(); own += 2 * padded)
        moments.push_back({0.0, own, own + padded});
    const auto k = kernels<T>(false);
    parallel_for(tiles * parts, threads, [&](int64_t item, int) {
        const int64_t tile = item / parts, part = item % parts;
        const int64_t image = tile / places, row = tile / s.cols % s.rows, col = tile % s.cols;
        const int64_t corner = (image * s.H + row * tile_height) * s.W + col * tile_width;
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
            const int64_t y = block / pieces, piece = block % pieces;
            const int64_t begin = line * piece / pieces, end = line * (piece + 1) / pieces;  // much the same sizes
            k.add_pixels(x + (corner + y * s.W + begin) * s.C, end - begin, s.C, &moments[item]);
        }
    });
    parallel_for(tiles, threads, [&](int64_t tile, int) {
        Moments& all = moments[tile * parts];
        for (int64_t part = 1; part < parts; ++part) k.add_moments(moments[tile * parts + part], s.C, &all);
        for (int64_t g = 0; g < s.G; ++g) {
            double center = 0.0, squares = 0.0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) center += all.mean[c] / static_cast<double>(size);
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                const double delta = all.mean[c] - center;
                squares += all.squares[c] + all.count * delta * delta;
            }
            const int64_t at = (tile / places * s.G + g) * places + tile % places;
            mean[at] = static_cast<float>(center);
            variance[at] = static_cast<float>(std::max(squares, 0.0) / (all.count * static_cast<double>(size)));
        }
    });
}

// What each channel of each image is normalised by, from figures per group: (B, padded) each.
struct Channels {
    int64_t padded;
    Buffer mean, scale, bias;
};

Channels spread(const float* mean, const float* inverse_std, const float* weight, const float* bias, const Sizes& s) {
    Channels channels;
    const int64_t padded = channels.padded = round_up(s.C, kMaxLanes), size = s.C / s.G;
    for (Buffer* buffer : {&channels.mean, &channels.scale, &channels.bias}) {
        *buffer = make_buffer(s.B * padded);
        std::fill(buffer->get(), buffer->get() + s.B * padded, 0.0f);
    }
    for (int64_t b = 0; b < s.B; ++b)
        for (int64_t c = 0; c < s.C; ++c) {
            const int64_t group = b * s.G + c / size, at = b * padded + c;
            channels.mean[at] = mean[group];
            channels.scale[at] = inverse_std[group] * weight[c];
            channels.bias[at] = bias[c];
        }
    return channels;
}

// Calls body(first pixel, pixels, offset of the image's channels, block) for blocks of pixels of every image.
template <class Body>
void for_each_block(const Sizes& s, int64_t padded, int threads, const Body& body) {
    const int64_t P = s.H * s.W, blocks = blocks_of(P);
    parallel_for(s.B * blocks, threads, [&](int64_t item, int) {
        const int64_t image = item / blocks, block = item % blocks;
        body(image * P + block * kPixelsPerBlock, block_size(block, P), image * padded, item);
    });
}

template <class T>
void group_norm(const T* x, const float* mean, const float* inverse_std, const float* weight, const float* bias, T* out,
                const Sizes& s, bool silu, int num_threads) {
    const Channels channels = spread(mean, inverse_std, weight, bias, s);
    const int64_t padded = channels.padded;
    const int threads = useful_threads(s.B * s.H * s.W * s.C, num_threads);
    const auto k = kernels<T>(silu);
    for_each_block(s, padded, threads, [&](int64_t pixel, int64_t pixels, int64_t image, int64_t) {
        k.channel_norm_rows(x + pixel * s.C, channels.mean.get() + image, channels.scale.get() + image,
                            channels.bias.get() + image, out + pixel * s.C, pixels, s.C);
    });
}

// mean and std: (B, H, cols, G), floor: (B, G); tiles and shares: (W, 4), which columns of tiles count how much for a
// column of pixels.
template <class T>
void tile_norm(const T* x, const float* mean, const float* std, const float* floor, const int32_t* tiles,
               const float* shares, const float* weight, const float* bias, T* out, const Sizes& s, float eps,
               bool silu, int num_threads) {
    const int64_t padded = round_up(s.C, kMaxLanes), size = s.C / s.G;
    const int threads = useful_threads(s.B * s.H * s.W * s.C, num_threads);
    const Buffer w = padded_copy(weight, s.C, padded), b = padded_copy(bias, s.C, padded);
    const int64_t floats = (2 * s.cols + 1) * padded;
    const Buffer scratch = make_buffer(threads * floats);
    const auto k = kernels<T>(silu);
    parallel_for(s.B * s.H, threads, [&](int64_t item, int worker) {
        float* means = scratch.get() + worker * floats;
        float *stds = means + s.cols * padded, *lowest = stds + s.cols * padded;
        std::fill(means, means + floats, 0.0f);
        for (int64_t tile = 0; tile < s.cols; ++tile)
            for (int64_t c = 0; c < s.C; ++c) {
                const int64_t from = (item * s.cols + tile) * s.G + c / size;
                means[tile * padded + c] = mean[from];
                stds[tile * padded + c] = std[from];
            }
        for (int64_t c = 0; c < s.C; ++c) lowest[c] = floor[item / s.H * s.G + c / size];
        const int64_t first = item * s.W * s.C;
        k.tile_norm_row(x + first, means, stds, lowest, tiles, shares, w.get(), b.get(), eps, out + first, s.W, s.C,
                        padded);
    });
}

// slope (B, G): the derivative of inverse_std by the variance.
template <class T>
void group_norm_backward(const T* x, const float* mean, const float* inverse_std, const float* slope,
                         const float* weight, const float* bias, const T* grad_out, T* grad_x, float* grad_weight,
                         float* grad_bias, const Sizes& s, bool silu, int num_threads) {
    const Channels channels = spread(mean, inverse_std, weight, bias, s);
    const int64_t padded = channels.padded, blocks = blocks_of(s.H * s.W), size = s.C / s.G;
    const int threads = useful_threads(s.B * s.H * s.W * s.C, num_threads);
    const Buffer sums = make_buffer(s.B * blocks * 2 * padded);
    const auto k = kernels<T>(silu);
    for_each_block(s, padded, threads, [&](int64_t pixel, int64_t pixels, int64_t image, int64_t item) {
        float* own = sums.get() + item * 2 * padded;
        std::fill(own, own + 2 * padded, 0.0f);
        k.channel_norm_sums(x + pixel * s.C, grad_out + pixel * s.C, channels.mean.get() + image,
                            channels.scale.get() + image, channels.bias.get() + image, pixels, s.C, own, own + padded);
    });
    const Buffer offset = make_buffer(s.B * padded), along = make_buffer(s.B * padded);
    std::fill(offset.get(), offset.get() + s.B * padded, 0.0f);
    std::fill(along.get(), along.get() + s.B * padded, 0.0f);
    std::vector<double> weight_sum(static_cast<size_t>(s.C), 0.0), bias_sum(static_cast<size_t>(s.C), 0.0);
    std::vector<double> totals(static_cast<size_t>(2 * padded));
    const double count = static_cast<double>(s.H * s.W * size);
    for (int64_t b = 0; b < s.B; ++b) {
        std::fill(totals.begin(), totals.end(), 0.0);
        for (int64_t block = 0; block < blocks; ++block) {
            const float* own = sums.get() + (b * blocks + block) * 2 * padded;
            for (int64_t i = 0; i < 2 * padded; ++i) totals[i] += own[i];
        }
        for (int64_t g = 0; g < s.G; ++g) {
            const int64_t group = b * s.G + g;
            double plain = 0.0, centered = 0.0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                weight_sum[c] += totals[padded + c] * inverse_std[group];
                bias_sum[c] += totals[c];
                plain += totals[c] * weight[c];
                centered += totals[padded + c] * weight[c];
            }
            for (int64_t c = b * padded + g * size; c < b * padded + (g + 1) * size; ++c) {
                offset[c] = static_cast<float>(-inverse_std[group] * plain / count);
                along[c] = static_cast<float>(2.0 * slope[group] * centered / count);
            }
        }
    }
    for (int64_t c = 0; c < s.C; ++c) {
        grad_weight[c] = static_cast<float>(weight_sum[c]);
        grad_bias[c] = static_cast<float>(bias_sum[c]);
    }
    for_each_block(s, padded, threads, [&](int64_t pixel, int64_t pixels, int64_t image, int64_t) {
        k.channel_norm_backward_rows(x + pixel * s.C, grad_out + pixel * s.C, channels.mean.get() + image,
                                     channels.scale.get() + image, channels.bias.get() + image, offset.get() + image,
                                     along.get() + image, grad_x + pixel * s.C, pixels, s.C);
    });
}

// ---- the C interface ----

// Checks what Python has checked already only as far as memory safety goes.
template <class Run>
int dispatch(const Sizes& s, int dtype, const Run& run) {
    if (s.B < 0 || s.H < 1 || s.W < 1 || s.C < 1 || s.G < 1 || s.C % s.G || s.rows < 1 || s.cols < 1 || s.H % s.rows ||
        s.W % s.cols)
        return GPSTOKEN_INVALID_ARGUMENT;
    return run_for_dtype(dtype, run);
}

}  // namespace
}  // namespace gpstoken

int gpstoken_pixel_norm_cpu(const void* x, const float* weight, const float* bias, void* out, int64_t P, int64_t C,
                            float eps, int silu, int dtype, int num_threads) {
    return gpstoken::dispatch({P, 1, 1, C, 1, 1, 1}, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::pixel_norm(static_cast<const T*>(x), weight, bias, static_cast<T*>(out), P, C, eps, silu != 0,
                             num_threads);
    });
}

int gpstoken_pixel_norm_backward_cpu(const void* x, const float* weight, const float* bias, const void* grad_out,
                                     void* grad_x, float* grad_weight, float* grad_bias, int64_t P, int64_t C,
                                     float eps, int silu, int dtype, int num_threads) {
    return gpstoken::dispatch({P, 1, 1, C, 1, 1, 1}, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::pixel_norm_backward(static_cast<const T*>(x), weight, bias, static_cast<const T*>(grad_out),
                                      static_cast<T*>(grad_x), grad_weight, grad_bias, P, C, eps, silu != 0,
                                      num_threads);
    });
}

int gpstoken_group_statistics_cpu(const void* x, float* mean, float* variance, int64_t B, int64_t H, int64_t W,
                                  int64_t C, int64_t G, int64_t rows, int64_t cols, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, H, W, C, G, rows, cols};
    return gpstoken::dispatch(sizes, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::group_statistics(static_cast<const T*>(x), mean, variance, sizes, num_threads);
    });
}

int gpstoken_group_norm_cpu(const void* x, const float* mean, const float* inverse_std, const float* weight,
                            const float* bias, void* out, int64_t B, int64_t H, int64_t W, int64_t C, int64_t G,
                            int silu, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, H, W, C, G, 1, 1};
    return gpstoken::dispatch(sizes, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::group_norm(static_cast<const T*>(x), mean, inverse_std, weight, bias, static_cast<T*>(out), sizes,
                             silu != 0, num_threads);
    });
}

int gpstoken_tile_norm_cpu(const void* x, const float* mean, const float* std, const float* floor, const int32_t* tiles,
                           const float* shares, const float* weight, const float* bias, void* out, int64_t B, int64_t H,
                           int64_t W, int64_t C, int64_t G, int64_t cols, float eps, int silu, int dtype,
                           int num_threads) {
    if (cols < 1) return GPSTOKEN_INVALID_ARGUMENT;
    return gpstoken::dispatch({B, H, W, C, G, 1, 1}, dtype, [&](auto zero) {
        using T = decltype(zero);
        const gpstoken::Sizes sizes = {B, H, W, C, G, 1, cols};
        gpstoken::tile_norm(static_cast<const T*>(x), mean, std, floor, tiles, shares, weight, bias,
                            static_cast<T*>(out), sizes, eps, silu != 0, num_threads);
    });
}

int gpstoken_group_norm_backward_cpu(const void* x, const float* mean, const float* inverse_std, const float* slope,
                                     const float* weight, const float* bias, const void* grad_out, void* grad_x,
                                     float* grad_weight, float* grad_bias, int64_t B, int64_t H, int64_t W, int64_t C,
                                     int64_t G, int silu, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, H, W, C, G, 1, 1};
    return gpstoken::dispatch(sizes, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::group_norm_backward(static_cast<const T*>(x), mean, inverse_std, slope, weight, bias,
                                      static_cast<const T*>(grad_out), static_cast<T*>(grad_x), grad_weight, grad_bias,
                                      sizes, silu != 0, num_threads);
    });
}
