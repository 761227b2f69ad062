// How complex regions are, on the GPU: a block of threads measures up to four of them.
//
// As on the CPU (partition.h), all that matters of a gradient's magnitude is its bin, so magnitudes are computed in
// float32 and the few that lie too near a bin's edge again as the reference does it. What comes before needs no such
// care: samples are the reference's own bits. Grey values map to multiples of 2^-25 in [0, 1] and weights are
// multiples of 1/128, so the reference's float64 sums before its roundings to float32 are exact, and a fused
// multiply-add in float32 rounds the same numbers. Differences and sums of samples, which are multiples of 2^-39, are
// exact in float64, in any order. What comes after is integers (counts), and float64 in the reference's own order.
//
// Nothing here belongs to the host: nvcc, NVRTC and a plain C++17 compiler (tests/emulation) take it.
#pragma once

#include "partition_arguments.h"

namespace gpstoken {
namespace cuda {

constexpr int kAtOnce = 4;          // regions: the halves of a square, cut along x and along y
constexpr int kSumsPerRegion = 16;  // of an entropy: eight side by side in each half of the bins
constexpr double kLargestComplexity = 1e300;

template <int kBoxes>
struct Measured {
    float sample[kSamples][kSamples];
    int counts[kBoxes][kBins];
    double partial[kBoxes][kSumsPerRegion];
    Box box[kBoxes];            // in
    double complexity[kBoxes];  // out
};

// ---- samples ----

// What sample i of an axis of `size` pixels lies between.
struct Tap {
    int lower, upper;
    float weight;  // of the upper pixel
};

__device__ __forceinline__ Tap tap(int i, int size) {
    // In 1/128 of a pixel; a size is at most 2^24.
    const int position = min(max((2 * i + 1) * size - kSamples, 0), (size - 1) * (2 * kSamples));
    const int lower = position / (2 * kSamples);
    return {lower, min(lower + 1, size - 1), static_cast<float>(position % (2 * kSamples)) / (2 * kSamples)};
}

__device__ __forceinline__ float blend(float lower, float upper, float weight) {
    return fmaf(upper - lower, weight, lower);
}

// To [0, 1]; a NaN becomes 0.
__device__ __forceinline__ float unit(float grey) { return (fminf(fmaxf(grey, -1.0f), 1.0f) + 1.0f) * 0.5f; }

// Each thread walks down a piece of a column and keeps the two source rows that it is between: in a small region
// several samples lie between the same ones.
template <int kThreads>
__device__ __forceinline__ void resample(const Picture& picture, const Box& box, float (&sample)[kSamples][kSamples]) {
    constexpr int kRows = kSamples * kSamples / kThreads;
    const int column = static_cast<int>(threadIdx.x) % kSamples;
    const int first = static_cast<int>(threadIdx.x) / kSamples * kRows;
    const int height = box.y1 - box.y0 + 1;
    const Tap across = tap(column, box.x1 - box.x0 + 1);
    const float* const origin = picture.grey + static_cast<long long>(box.y0) * picture.width + box.x0;
    const auto blended_row = [&](int row) {
        const float* const pixels = origin + static_cast<long long>(row) * picture.width;
        return blend(unit(pixels[across.lower]), unit(pixels[across.upper]), across.weight);
    };
    int lower_row = -1, upper_row = -1;
    float lower = 0.0f, upper = 0.0f;
    for (int row = first; row < first + kRows; ++row) {
        const Tap down = tap(row, height);
        if (down.lower != lower_row) lower = down.lower == upper_row ? upper : blended_row(down.lower);
        if (down.upper != upper_row) upper = down.upper == down.lower ? lower : blended_row(down.upper);
        lower_row = down.lower;
        upper_row = down.upper;
        sample[row][column] = blend(lower, upper, down.weight);
    }
}

// ---- gradients ----

// To 2^-23 of the root.
__device__ __forceinline__ float rough_root(float value) {
#if defined(__CUDACC__)
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
    return root;
#else
    return sqrtf(value);
#endif
}

// The reference's own arithmetic: each operation is rounded by itself, the products above all.
__device__ __forceinline__ int exact_bin(const float (&sample)[kSamples][kSamples], int row, int column) {
    const int above = max(row - 1, 0), below = min(row + 1, kSamples - 1);
    const int left = max(column - 1, 0), right = min(column + 1, kSamples - 1);
    const auto at = [&](int y, int x) { return static_cast<double>(sample[y][x]); };
    const double gradient_x = at(above, right) - at(above, left) + 2 * (at(row, right) - at(row, left)) +
                              (at(below, right) - at(below, left));
    const double gradient_y = at(below, left) + 2 * at(below, column) + at(below, right) -
                              (at(above, left) + 2 * at(above, column) + at(above, right));
    const double square_x = product(gradient_x, gradient_x), square_y = product(gradient_y, gradient_y);
    const double magnitude = sqrt(square_x + square_y);
    int bin = static_cast<int>(magnitude / kBinWidth);
    if (magnitude < bin * kBinWidth) --bin;
    if (magnitude >= (bin + 1) * kBinWidth) ++bin;
    return bin;
}

// Neighbours often share a bin, so each thread counts runs of equal ones down its piece of a column before it adds them
// to the block's counts. Integers: the order of additions does not matter.
template <int kThreads>
__device__ __forceinline__ void count_bins(const float (&sample)[kSamples][kSamples], int (&counts)[kBins]) {
    constexpr float kBinsPerUnit = static_cast<float>(1.0 / kBinWidth);
    // How far, in bins, a position computed here may be from the reference's. Samples are exact and in [0, 1]. The
    // float32 roundings of the two sums are below 4.8e-7 and 3.0e-7, 46.5 bins per unit make 2.7e-5 of that; squares,
    // root and products err by less than 3.6e-7 of the result.
    constexpr float kError = 5e-5f, kRelativeError = 1e-6f;
    constexpr int kRows = kSamples * kSamples / kThreads;
    const int column = static_cast<int>(threadIdx.x) % kSamples;
    const int first = static_cast<int>(threadIdx.x) / kSamples * kRows;
    const int left = max(column - 1, 0), right = min(column + 1, kSamples - 1);
    const auto difference = [&](int row) { return sample[row][right] - sample[row][left]; };
    const auto smoothed = [&](int row) {
        return fmaf(2.0f, sample[row][column], sample[row][left] + sample[row][right]);
    };
    float difference_above = difference(max(first - 1, 0)), smoothed_above = smoothed(max(first - 1, 0));
    float difference_here = difference(first), smoothed_here = smoothed(first);
    int run_bin = 0, run = 0;
    for (int row = first; row < first + kRows; ++row) {
        const int below = min(row + 1, kSamples - 1);
        const float difference_below = difference(below), smoothed_below = smoothed(below);
        const float gradient_x = fmaf(2.0f, difference_here, difference_above + difference_below);
        const float gradient_y = smoothed_below - smoothed_above;
        const float position = rough_root(fmaf(gradient_x, gradient_x, gradient_y * gradient_y)) * kBinsPerUnit;
        int bin = static_cast<int>(fmaf(position, 1.0f - kRelativeError, -kError));
        if (bin != static_cast<int>(fmaf(position, 1.0f + kRelativeError, kError)))
            bin = exact_bin(sample, row, column);
        if (bin != run_bin) {
            if (run > 0) atomicAdd(&counts[run_bin], run);
            run_bin = bin;
            run = 0;
        }
        ++run;
        difference_above = difference_here;
        difference_here = difference_below;
        smoothed_above = smoothed_here;
        smoothed_here = smoothed_below;
    }
    atomicAdd(&counts[run_bin], run);
}

// ---- complexity ----

__device__ __forceinline__ double bias_inside(const Picture& picture, const Box& box) {
    const auto sum = [&](int y, int x) {  // of all rows to y and columns to x
        return y < 0 || x < 0 ? 0.0 : picture.bias_sums[static_cast<long long>(y) * picture.width + x];
    };
    return sum(box.y1, box.x1) - sum(box.y0 - 1, box.x1) - sum(box.y1, box.x0 - 1) + sum(box.y0 - 1, box.x0 - 1);
}

// shared.box -> shared.complexity for the first `count` boxes. All threads of the block call it; a barrier before, so
// that they see the boxes, and one behind it are included.
template <int kThreads, int kBoxes>
__device__ __forceinline__ void measure(const Picture& picture, int count, Measured<kBoxes>& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kBoxes * kBins; i += kThreads) shared.counts[i / kBins][i % kBins] = 0;
    for (int i = 0; i < count; ++i) {
        __syncthreads();
        resample<kThreads>(picture, shared.box[i], shared.sample);
        __syncthreads();
        count_bins<kThreads>(shared.sample, shared.counts[i]);
    }
    __syncthreads();
    // NumPy's order of summation: eight sums side by side in each block of 128, then pairs of these.
    if (thread < count * kSumsPerRegion) {
        const int* const counts = shared.counts[thread / kSumsPerRegion];
        const int from = thread % kSumsPerRegion / 8 * (kBins / 2) + thread % 8;
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < kBins / 2; i += 8) sum += picture.terms[counts[from + i]];
        shared.partial[thread / kSumsPerRegion][thread % kSumsPerRegion] = sum;
    }
    __syncthreads();
    if (thread < count) {
        const auto half = [&](const double* s) {
            return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
        };
        const double entropy = -(half(shared.partial[thread]) + half(shared.partial[thread] + 8));
        const Box box = shared.box[thread];
        double complexity = region_complexity(entropy, picture.exponent, box.y1 - box.y0 + 1, box.x1 - box.x0 + 1);
        if (picture.bias_sums != nullptr) complexity += bias_inside(picture, box);
        // Changes only what a bias that is not finite has led to: a NaN would upset the order of the list of regions.
        shared.complexity[thread] = fmin(fmax(complexity, -kLargestComplexity), kLargestComplexity);
    }
    __syncthreads();
}

}  // namespace cuda
}  // namespace gpstoken
