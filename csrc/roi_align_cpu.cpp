// RoIAlign on the CPU: bilinear samples of channel-last maps, averaged over the cells of each region. Forward, threads
// take regions; backward, images and channels, whose regions each adds in their order. So nothing is written by two,
// and results do not depend on the number of threads.
#include <algorithm>
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

// ---- where a region is read along one axis ----

// Consecutive pixels and how much each counts.
struct Band {
    int64_t first, count;
    const float* weights;
};

// The bands of a region's bins along one axis of `length` pixels. All lie in begin..end-1, which is empty where a
// region has no extent or lies outside the map.
struct Axis {
    Axis(int64_t bins, int64_t length)
        : bins(bins),
          length(length),
          first(static_cast<size_t>(bins)),
          count(static_cast<size_t>(bins)),
          weights(static_cast<size_t>(bins * length)) {}

    Band band(int64_t bin) const { return {first[bin], count[bin], &weights[bin * length + first[bin]]}; }

    // From `from` to `to`, in units of 1 / scale pixels. The arithmetic is torchvision's, step by step: whether a bin
    // takes one sample more may hang on a rounding.
    void set(float from, float to, float scale) {
        const float start = from * scale - 0.5f, extent = to * scale - 0.5f - start;
        const float bin_size = extent / static_cast<float>(bins);
        const float samples = std::ceil(extent / static_cast<float>(bins));
        begin = length;
        end = 0;
        for (int64_t bin = 0; bin < bins; ++bin) {
            float* weight = &weights[bin * length];
            int64_t low = 0, high = 0;  // pixels low..high-1 have a weight
            const auto add = [&](int64_t pixel, float share) {
                if (low == high) low = high = pixel;
                while (high <= pixel) weight[high++] = 0.0f;
                weight[pixel] += share;
            };
            for (float sample = 0.0f; sample < samples; ++sample) {
                float position = start + static_cast<float>(bin) * bin_size + (sample + 0.5f) * bin_size / samples;
                if (!(position >= -1.0f && position <= static_cast<float>(length))) continue;
                position = std::max(position, 0.0f);
                const int64_t pixel = std::min(static_cast<int64_t>(position), length - 1);
                const float beyond = pixel + 1 < length ? position - static_cast<float>(pixel) : 0.0f;
                add(pixel, 1.0f - beyond);
                if (beyond > 0.0f) add(pixel + 1, beyond);
            }
            for (int64_t pixel = low; pixel < high; ++pixel) weight[pixel] /= samples;
            first[bin] = low;
            count[bin] = high - low;
            if (low == high) continue;
            begin = std::min(begin, low);
            end = std::max(end, high);
        }
        begin = std::min(begin, end);
    }

    int64_t bins, length, begin = 0, end = 0;
    std::vector<int64_t> first, count;
    std::vector<float> weights;  // (bins, length)
};

// ---- one copy of the inner loops per instruction set ----

constexpr int64_t kBlock = 16;  // channels at a time: at least a vector of any instruction set

#define GPSTOKEN_KERNEL_FILE "roi_align_cpu_kernel.h"
#include "each_isa.h"

template <class T>
struct Kernels {
    decltype(&baseline::read_region<T>) read_region;
    decltype(&baseline::add_region<T>) add_region;
};

template <class T>
Kernels<T> kernels() {
#if defined(GPSTOKEN_X86_DISPATCH)
    if (best_isa() == Isa::kAvx512) return {avx512::read_region<T>, avx512::add_region<T>};
    if (best_isa() == Isa::kAvx2) return {avx2::read_region<T>, avx2::add_region<T>};
#endif
    return {baseline::read_region<T>, baseline::add_region<T>};
}

// ---- the problem ----

struct Sizes {
    int64_t B, H, W, C, N, bins;

    int64_t numbers() const { return B * (H * W + N * bins * bins) * C; }
};

// What one thread works with.
struct Workspace {
    explicit Workspace(const Sizes& s)
        : down(s.bins, s.H),
          across(s.bins, s.W),
          columns(make_buffer(s.W * kBlock)),
          block(make_buffer(round_up(s.bins * s.bins, kBlock) * kBlock)) {}

    void set(const float* region, float scale) {
        across.set(region[0], region[2], scale);
        down.set(region[1], region[3], scale);
    }

    Axis down, across;
    Buffer columns, block;
};

std::vector<Workspace> make_workspaces(const Sizes& s, int threads) {
    std::vector<Workspace> workspaces;
    for (int i = 0; i < threads; ++i) workspaces.emplace_back(s);
    return workspaces;
}

template <class T>
void roi_align(const T* features, const float* regions, T* cells, const Sizes& s, float scale, int num_threads) {
    const int threads = useful_threads(s.numbers(), num_threads);
    std::vector<Workspace> own_of = make_workspaces(s, threads);
    const auto k = kernels<T>();
    parallel_for(s.B * s.N, threads, [&](int64_t item, int worker) {
        Workspace& own = own_of[worker];
        own.set(regions + item * 4, scale);
        k.read_region(features + item / s.N * s.H * s.W * s.C, s.W, s.C, own.down, own.across,
                      cells + item * s.C * s.bins * s.bins, own.columns.get(), own.block.get());
    });
}

template <class T>
void roi_align_backward(const float* regions, const T* grad_cells, T* grad_features, const Sizes& s, float scale,
                        int num_threads) {
    const int threads = useful_threads(s.numbers(), num_threads);
    // As many channels per item as keep all threads busy.
    const int64_t wanted = divide_up(threads, std::max<int64_t>(s.B, 1));
    const int64_t share = round_up(divide_up(s.C, wanted), kBlock), shares = divide_up(s.C, share);
    const int64_t P = s.H * s.W;
    // Whole blocks of float32 are added up where they belong, others beside.
    const bool in_place = std::is_same<T, float>::value && s.C % kBlock == 0;
    std::vector<Workspace> own_of = make_workspaces(s, threads);
    const Buffer beside = make_buffer(in_place ? 0 : threads * P * share);
    const auto k = kernels<T>();
    parallel_for(s.B * shares, threads, [&](int64_t item, int worker) {
        const int64_t image = item / shares, first = item % shares * share, channels = std::min(share, s.C - first);
        T* grads = grad_features + image * P * s.C + first;
        const int64_t stride = in_place ? s.C : share;
        float* sums = in_place ? reinterpret_cast<float*>(grads) : beside.get() + worker * P * share;
        for (int64_t p = 0; p < P; ++p)
            std::fill(sums + p * stride, sums + p * stride + round_up(channels, kBlock), 0.0f);
        Workspace& own = own_of[worker];
        for (int64_t n = 0; n < s.N; ++n) {
            const int64_t region = image * s.N + n;
            own.set(regions + region * 4, scale);
            k.add_region(grad_cells + (region * s.C + first) * s.bins * s.bins, s.W, channels, own.down, own.across,
                         sums, stride, own.columns.get(), own.block.get());
        }
        if (in_place) return;
        for (int64_t p = 0; p < P; ++p)
            for (int64_t c = 0; c < channels; ++c) grads[p * s.C + c] = from_float<T>(sums[p * stride + c]);
    });
}

// ---- the C interface ----

// Checks what Python has checked already only as far as memory safety goes.
template <class Run>
int dispatch(const Sizes& s, int dtype, const Run& run) {
    if (s.B < 0 || s.H < 1 || s.W < 1 || s.C < 1 || s.N < 0 || s.bins < 1) return GPSTOKEN_INVALID_ARGUMENT;
    return run_for_dtype(dtype, run);
}

}  // namespace
}  // namespace gpstoken

int gpstoken_roi_align_cpu(const void* features, const float* regions, void* cells, int64_t B, int64_t H, int64_t W,
                           int64_t C, int64_t N, int64_t bins, float scale, int dtype, int num_threads) {
    const gpstoken::Sizes sizes = {B, H, W, C, N, bins};
    return gpstoken::dispatch(sizes, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::roi_align(static_cast<const T*>(features), regions, static_cast<T*>(cells), sizes, scale,
                            num_threads);
    });
}

int gpstoken_roi_align_backward_cpu(const float* regions, const void* grad_cells, void* grad_features, int64_t B,
                                    int64_t H, int64_t W, int64_t C, int64_t N, int64_t bins, float scale, int dtype,
                                    int num_threads) {
    const gpstoken::Sizes sizes = {B, H, W, C, N, bins};
    return gpstoken::dispatch(sizes, dtype, [&](auto zero) {
        using T = decltype(zero);
        gpstoken::roi_align_backward(regions, static_cast<const T*>(grad_cells), static_cast<T*>(grad_features), sizes,
                                     scale, num_threads);
    });
}
