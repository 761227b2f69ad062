// The rules of the partition that the CPU and CUDA libraries share, to the last bit. The reference is
// gpstoken_diffusers/ops/partition_reference.py.
//
// Regions compete by their complexities, and symmetric pictures make many of these equal or all but equal, so the
// libraries agree on regions and their order only if they agree on every rounding. What is here uses nothing but
// operations that IEEE 754 rounds correctly. None may be fused with another: nvcc is kept from that by product(), other
// compilers by their options.
#pragma once

#include "host_device.h"

namespace gpstoken {

constexpr int kSamples = 64;              // a region is resampled to 64 x 64
constexpr int kBins = 256;                // the upper half of the reference's 512: no magnitude is negative
constexpr double kBinWidth = 11.0 / 512;  // exact, as are all edges

struct Box {
    int x0, y0, x1, y1;  // pixels, inclusive
};

// ---- how regions are cut ----

GPSTOKEN_INLINE bool splittable(const Box& box, int min_region_size) {
    return box.x1 - box.x0 > min_region_size || box.y1 - box.y0 > min_region_size;
}

// Of an odd length the first half is the shorter one.
GPSTOKEN_INLINE Box half_of(const Box& box, bool along_x, bool second) {
    Box half = box;
    const int x = box.x0 + (box.x1 - box.x0 + 1) / 2, y = box.y0 + (box.y1 - box.y0 + 1) / 2;
    if (along_x && second) half.x0 = x;
    if (along_x && !second) half.x1 = x - 1;
    if (!along_x && second) half.y0 = y;
    if (!along_x && !second) half.y1 = y - 1;
    return half;
}

// Whether a square is cut along x, from the complexities of its halves.
GPSTOKEN_INLINE bool square_is_cut_along_x(double left, double right, double top, double bottom) {
    return (right < left ? right : left) < (bottom < top ? bottom : top);
}

// A region's place in the order in which the reference would pick it: complexity, then place in the list. Sorting the
// list stably again and again never changes the order of equals, and new regions always come last, so the order in
// which regions were made decides among equals.
GPSTOKEN_INLINE bool comes_first(double complexity, int64_t index, double other_complexity, int64_t other_index) {
    return complexity != other_complexity ? complexity > other_complexity : index < other_index;
}

// ---- complexity ----

// p log2(p + 1e-10) of a bin of `count` samples. For the host alone, CUDA's library included: C libraries differ in
// the last digit of log2, so kernels get these as a table.
GPSTOKEN_INLINE double entropy_term(int count) {
    const double p = static_cast<double>(count) / (kSamples * kSamples + 1e-5);
    return p * log2(p + 1e-10);
}

// A product that is rounded by itself, whatever is added to it.
GPSTOKEN_INLINE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// An unevaluated sum of two doubles, `high` being the nearest to it: twice the digits.
struct Wide {
    double high, low;
};

// high + low for |low| much smaller than |high|.
GPSTOKEN_INLINE Wide normalised(double high, double low) {
    const double sum = high + low;
    return {sum, low - (sum - high)};
}

GPSTOKEN_INLINE Wide multiply(const Wide& a, const Wide& b) {
    const double high = product(a.high, b.high);
    return normalised(high, fma(a.low, b.high, fma(a.high, b.low, fma(a.high, b.high, -high))));
}

GPSTOKEN_INLINE Wide square_root(const Wide& a) {
    const double root = sqrt(a.high);
    return normalised(root, (fma(-root, root, a.high) + a.low) / (root + root));  // a step of Newton's method
}

// base^exponent for a normal base > 0 and exponents from 0 to 100. Its relative error is below 2^-95, and so it is the
// nearest double but for one case in 10^12, unless that is below 2^-1022 and has fewer digits. C libraries' pow, which
// miss the nearest double in one case of a thousand, each in others, would not do: not even glibc's is the same on
// every processor.
GPSTOKEN_INLINE double power(double base, double exponent) {
    // The whole part of the exponent by squaring, of a number in [0.5, 1) so that nothing overflows or vanishes; the
    // fraction by square roots, one for each binary digit.
    int scale;
    Wide square = {frexp(base, &scale), 0.0};
    Wide result = {1.0, 0.0};
    const int whole = static_cast<int>(exponent);
    for (int rest = whole; rest > 0; rest >>= 1) {
        if (rest & 1) result = multiply(result, square);
        square = multiply(square, square);
    }
    Wide root = {base, 0.0};
    double fraction = exponent - whole;
    for (int digit = 0; fraction > 0.0 && digit < 120; ++digit) {  // what comes later changes nothing
        root = square_root(root);
        fraction += fraction;
        if (fraction >= 1.0) {
            result = multiply(result, root);
            fraction -= 1.0;
        }
    }
    return ldexp(result.high, scale * whole);
}

// Without the user's bias.
GPSTOKEN_INLINE double region_complexity(double entropy, double exponent, int height, int width) {
    return product(product(power(entropy, exponent), static_cast<double>(height)), static_cast<double>(width));
}

}  // namespace gpstoken
