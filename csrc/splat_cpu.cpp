// Splatting on the CPU: forward in parallel over bands of rows, backward over tokens, both without atomics and with a
// fixed order of additions, so that results do not depend on the number of threads.
#include <cmath>
#include <cstring>

#include "cpu_buffer.h"
#include "cpu_isa.h"
#include "dtype_dispatch.h"
#include "gpstoken_native.h"
#include "half_types.h"
#include "parallel.h"
#include "splat.h"

namespace gpstoken {
namespace {

// Pixel centres of the columns (padded by kMaxLanes for whole vectors) and of the rows.
struct Grid {
    const float* x;
    const float* y;
};

constexpr int kMaxLanes = 16;

// ---- one copy of the inner loops per instruction set ----

#define GPSTOKEN_KERNEL_FILE "splat_cpu_kernel.h"
#include "each_isa.h"

struct Kernels {
    int lanes;
    decltype(&baseline::paint) paint;
    decltype(&baseline::gather) gather;
};

Kernels choose_kernels() {
#if defined(GPSTOKEN_X86_DISPATCH)
    if (best_isa() == Isa::kAvx512) return {avx512::kLanes, avx512::paint, avx512::gather};
    if (best_isa() == Isa::kAvx2) return {avx2::kLanes, avx2::paint, avx2::gather};
#endif
    return {baseline::kLanes, baseline::paint, baseline::gather};
}

const Kernels& kernels() {
    static const Kernels chosen = choose_kernels();
    return chosen;
}

// ---- the problem ----

struct Sizes {
    int64_t B, N, C, H, W;
};

// Everything both directions start from: pixel centres, tokens ready to evaluate, textures as padded float32.
struct Scene {
    Sizes size;
    int64_t channels;  // padded
    int threads;
    std::vector<float> grid_x, grid_y;
    Buffer texture;
    std::vector<Gaussian> gaussians;

    Grid grid() const { return {grid_x.data(), grid_y.data()}; }
    const float* texture_of(int64_t token) const { return texture.get() + token * channels; }
};

constexpr int64_t kTokensPerItem = 64;

template <class T>
Scene make_scene(const float* geometry, const T* texture, const Sizes& s, float support, int num_threads) {
    Scene scene;
    scene.size = s;
    scene.channels = round_up(std::max<int64_t>(s.C, 1), kernels().lanes);
    // Starting a thread takes some 20 us: each must have more than that to do.
    constexpr int64_t kFloatsPerThread = 32 * 1024;
    const int64_t floats = s.B * (s.H * s.W + s.N) * scene.channels;
    scene.threads = static_cast<int>(std::min<int64_t>(num_threads, 1 + floats / kFloatsPerThread));
    scene.grid_x.resize(static_cast<size_t>(s.W + kMaxLanes));
    scene.grid_y.resize(static_cast<size_t>(s.H));
    for (int64_t i = 0; i < s.W; ++i) scene.grid_x[i] = pixel_center(i, s.W);
    for (int64_t i = 0; i < s.H; ++i) scene.grid_y[i] = pixel_center(i, s.H);
    const int64_t tokens = s.B * s.N;
    scene.texture = make_buffer(tokens * scene.channels);
    scene.gaussians.resize(static_cast<size_t>(tokens));
    parallel_for(divide_up(tokens, kTokensPerItem), scene.threads, [&](int64_t item, int) {
        const int64_t end = std::min(tokens, (item + 1) * kTokensPerItem);
        for (int64_t i = item * kTokensPerItem; i < end; ++i) {
            scene.gaussians[i] = make_gaussian(geometry + 5 * i, s.H, s.W, support);
            float* to = scene.texture.get() + i * scene.channels;
            for (int64_t c = 0; c < s.C; ++c) to[c] = to_float(texture[i * s.C + c]);
            std::fill(to + s.C, to + scene.channels, 0.0f);
        }
    });
    return scene;
}

// ---- between the caller's planes (C, pixels), `plane` elements apart, and our (pixels, padded channels) ----

constexpr int64_t kPixelBlock = 32;  // pixels at a time, so that all their channels stay in the first-level cache

template <class T>
void to_planes(const float* pixels, int64_t channels, T* planes, int64_t C, int64_t plane, int64_t count) {
    for (int64_t first = 0; first < count; first += kPixelBlock) {
        const int64_t end = std::min(count, first + kPixelBlock);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t i = first; i < end; ++i) planes[c * plane + i] = from_float<T>(pixels[i * channels + c]);
    }
}

template <class T>
void from_planes(const T* planes, int64_t C, int64_t plane, float* pixels, int64_t channels, int64_t count) {
    for (int64_t first = 0; first < count; first += kPixelBlock) {
        const int64_t end = std::min(count, first + kPixelBlock);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t i = first; i < end; ++i) pixels[i * channels + c] = to_float(planes[c * plane + i]);
        for (int64_t i = first; i < end; ++i) std::fill(pixels + i * channels + C, pixels + (i + 1) * channels, 0.0f);
    }
}

// ---- forward ----

// Which tokens touch which band of rows: tokens[start[b]] .. tokens[start[b + 1]] for band b, in rising order.
struct Bands {
    int64_t rows, per_image;
    std::vector<int64_t> start, tokens;
};

Bands sort_into_bands(const Scene& scene) {
    const Sizes& s = scene.size;
    Bands bands;
    // A band's accumulator should stay in the second-level cache, and every thread should get a few bands.
    constexpr int64_t kCacheFloats = 64 * 1024;
    bands.rows = std::min<int64_t>(16, std::max<int64_t>(1, kCacheFloats / (s.W * scene.channels)));
    while (bands.rows > 4 && s.B * divide_up(s.H, bands.rows) < 4 * scene.threads) bands.rows /= 2;
    bands.per_image = divide_up(s.H, bands.rows);
    bands.start.assign(static_cast<size_t>(s.B * bands.per_image + 1), 0);
    const auto for_each_band = [&](auto&& act) {
        for (int64_t i = 0; i < s.B * s.N; ++i) {
            const Gaussian& g = scene.gaussians[i];
            if (g.empty()) continue;
            const int64_t image = i / s.N * bands.per_image;
            for (int64_t b = g.y0 / bands.rows; b <= g.y1 / bands.rows; ++b) act(image + b, i);
        }
    };
    // A counting sort; filling moves start[b] to the band's end, hence the shift by one.
    for_each_band([&](int64_t band, int64_t) { ++bands.start[band + 1]; });
    for (size_t b = 1; b < bands.start.size(); ++b) bands.start[b] += bands.start[b - 1];
    bands.tokens.resize(static_cast<size_t>(bands.start.back()));
    std::vector<int64_t> cursor(bands.start.begin(), bands.start.end() - 1);
    for_each_band([&](int64_t band, int64_t token) { bands.tokens[cursor[band]++] = token; });
    return bands;
}

template <class T>
void forward(const float* geometry, const T* texture, T* out, const Sizes& s, float support, int num_threads) {
    const Scene scene = make_scene(geometry, texture, s, support, num_threads);
    const Bands bands = sort_into_bands(scene);
    const int64_t band_floats = bands.rows * s.W * scene.channels;
    const int64_t scratch_floats = band_floats + round_up(s.W, kMaxLanes);
    const Buffer scratch = make_buffer(scene.threads * scratch_floats);
    parallel_for(s.B * bands.per_image, scene.threads, [&](int64_t item, int worker) {
        const int64_t image = item / bands.per_image, top = item % bands.per_image * bands.rows;
        const int64_t bottom = std::min(top + bands.rows, s.H) - 1;
        float* band = scratch.get() + worker * scratch_floats;
        std::fill(band, band + band_floats, 0.0f);
        for (int64_t i = bands.start[item]; i < bands.start[item + 1]; ++i) {
            const int64_t token = bands.tokens[i];
            const Gaussian& g = scene.gaussians[token];
            kernels().paint(g, scene.texture_of(token), scene.grid(), scene.channels, s.W, top,
                            std::max<int64_t>(g.y0, top), std::min<int64_t>(g.y1, bottom), band + band_floats, band);
        }
        to_planes(band, scene.channels, out + (image * s.C * s.H + top) * s.W, s.C, s.H * s.W,
                  (bottom - top + 1) * s.W);
    });
}

// ---- backward ----

template <class T>
void backward(const float* geometry, const T* texture, const T* grad_out, float* grad_geometry, T* grad_texture,
              const Sizes& s, float support, int num_threads) {
    const Scene scene = make_scene(geometry, texture, s, support, num_threads);
    // grad_out is turned channel-last as float32, as many images at a time as fit a bounded buffer.
    constexpr int64_t kBufferFloats = 4 * 1024 * 1024;
    const int64_t image_floats = s.H * s.W * scene.channels;
    const int64_t images_at_once = std::max<int64_t>(1, std::min(s.B, kBufferFloats / image_floats));
    const Buffer grad = make_buffer(images_at_once * image_floats);
    const int64_t row_stride = round_up(s.W, kMaxLanes);
    const int64_t scratch_floats = 3 * row_stride + scene.channels;
    const Buffer scratch = make_buffer(scene.threads * scratch_floats);
    for (int64_t first = 0; first < s.B; first += images_at_once) {
        const int64_t images = std::min(images_at_once, s.B - first);
        parallel_for(images * s.H, scene.threads, [&](int64_t item, int) {
            const int64_t image = first + item / s.H, y = item % s.H;
            float* to = grad.get() + item * s.W * scene.channels;
            from_planes(grad_out + (image * s.C * s.H + y) * s.W, s.C, s.H * s.W, to, scene.channels, s.W);
        });
        parallel_for(divide_up(images * s.N, 8), scene.threads, [&](int64_t item, int worker) {
            float* row = scratch.get() + worker * scratch_floats;
            float* sums = row + 3 * row_stride;
            for (int64_t i = item * 8; i < std::min(images * s.N, item * 8 + 8); ++i) {
                const int64_t token = first * s.N + i;
                const Gaussian& g = scene.gaussians[token];
                std::fill(sums, sums + scene.channels, 0.0f);
                std::fill(grad_geometry + 5 * token, grad_geometry + 5 * token + 5, 0.0f);
                if (!g.empty()) {
                    const Moments m = kernels().gather(g, scene.texture_of(token), grad.get() + i / s.N * image_floats,
                                                       scene.grid(), scene.channels, s.W, row, row_stride, sums);
                    write_geometry_gradient(g, m, grad_geometry + 5 * token);
                }
                for (int64_t c = 0; c < s.C; ++c) grad_texture[token * s.C + c] = from_float<T>(sums[c]);
            }
        });
    }
}

// ---- the C interface ----

// Checks what Python has checked already only as far as memory safety goes.
template <class Run>
int dispatch(const Sizes& s, float support, int dtype, const Run& run) {
    if (s.B < 0 || s.N < 0 || s.C < 0 || s.H < 1 || s.W < 1 || s.H > INT32_MAX || s.W > INT32_MAX || !(support > 0.0f))
        return GPSTOKEN_INVALID_ARGUMENT;
    return run_for_dtype(dtype, run);
}

}  // namespace
}  // namespace gpstoken

int gpstoken_splat_forward_cpu(const float* geometry, const void* texture, void* out, int64_t B, int64_t N, int64_t C,
                               int64_t H, int64_t W, float support, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, N, C, H, W};
    return gpstoken::dispatch(sizes, support, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::forward(geometry, static_cast<const T*>(texture), static_cast<T*>(out), sizes, support,
                          std::max(num_threads, 1));
    });
}

int gpstoken_splat_backward_cpu(const float* geometry, const void* texture, const void* grad_out, float* grad_geometry,
                                void* grad_texture, int64_t B, int64_t N, int64_t C, int64_t H, int64_t W,
                                float support, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, N, C, H, W};
    return gpstoken::dispatch(sizes, support, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::backward(geometry, static_cast<const T*>(texture), static_cast<const T*>(grad_out), grad_geometry,
                           static_cast<T*>(grad_texture), sizes, support, std::max(num_threads, 1));
    });
}
