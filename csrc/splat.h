// The mathematics of splatting that the CPU and CUDA kernels share.
//
// A token has geometry (sigma_x, sigma_y, rho, x, y) in [-1, 1] coordinates of the image. At a pixel centre (px, py)
//
//     u = (px - x) / sigma_x          v = (py - y) / sigma_y
//     weight = exp(-(u^2 - 2 rho u v + v^2) / (2 (1 - rho^2)))     where |px - x| <= support sigma_x and
//                                                                        |py - y| <= support sigma_y, else 0.
//
// The exponent is evaluated as -(q^2 + v^2) / 2 with q = k (u - rho v), k = 1 / sqrt(1 - rho^2): the same number, but
// without the cancellation that costs the expanded form its last digits when |rho| is near 1. In these terms
//
//     d weight / d x       = weight k q / sigma_x
//     d weight / d sigma_x = weight (q^2 + k rho q v) / sigma_x                     (k q u = q^2 + k rho q v)
//     d weight / d y       = weight (v - k rho q) / sigma_y
//     d weight / d sigma_y = weight (v^2 - k rho q v) / sigma_y
//     d weight / d rho     = weight (k q v - rho k^2 q^2)
//
// so five sums over pixels of s weight {q, v, q^2, q v, v^2}, s = <texture, grad_out>, give all geometry gradients.
//
// A token whose geometry is not finite, whose sigmas are not positive normal numbers, or with |rho| >= 1 paints nothing
// and gets zero gradients.
#pragma once

#include "host_device.h"

namespace gpstoken {

// Coordinate of sample i on an axis of n samples: -1 and 1 are the centres of the first and last; 0 if there is one.
GPSTOKEN_INLINE float pixel_center(int64_t i, int64_t n) {
    return n > 1 ? static_cast<float>(2.0 * static_cast<double>(i) / static_cast<double>(n - 1) - 1.0) : 0.0f;
}

// The box test of one axis, the same float32 operations as in the reference.
GPSTOKEN_INLINE bool inside_box(float pixel, float center, float half_width) {
    const float offset = pixel - center;
    return offset >= -half_width && offset <= half_width;
}

// Pixels first..last of an axis of n samples that pass inside_box; last < first if there are none (NaN included).
GPSTOKEN_INLINE void pixel_range(float center, float half_width, int64_t n, int64_t* first, int64_t* last) {
    // A guess in double, two pixels too wide for its rounding, then the exact test at both ends.
    const double scale = 0.5 * static_cast<double>(n - 1);
    const double low = (static_cast<double>(center) - half_width + 1.0) * scale - 2.0;
    const double high = (static_cast<double>(center) + half_width + 1.0) * scale + 2.0;
    const double top = static_cast<double>(n - 1);
    *first = 0;
    *last = -1;
    if (!(low <= top && high >= 0.0)) return;
    int64_t i = low > 0.0 ? static_cast<int64_t>(low) : 0;
    int64_t j = high < top ? static_cast<int64_t>(high) : n - 1;
    while (i <= j && !inside_box(pixel_center(i, n), center, half_width)) ++i;
    while (j >= i && !inside_box(pixel_center(j, n), center, half_width)) --j;
    *first = i;
    *last = j;
}

// One token, ready to be evaluated. An empty pixel range if it paints nothing.
struct Gaussian {
    float x, y;                      // centre
    float inv_sigma_x, inv_sigma_y;  // 1 / sigma
    float rho, k;                    // k = 1 / sqrt(1 - rho^2)
    int32_t x0, x1, y0, y1;          // pixels of its box, inclusive

    GPSTOKEN_INLINE bool empty() const { return x1 < x0 || y1 < y0; }
};

// geometry: the five numbers of one token.
GPSTOKEN_INLINE Gaussian make_gaussian(const float* geometry, int64_t height, int64_t width, float support) {
    const float sigma_x = geometry[0], sigma_y = geometry[1], rho = geometry[2], x = geometry[3], y = geometry[4];
    Gaussian g = {x, y, 0.0f, 0.0f, rho, 0.0f, 0, -1, 0, -1};
    const bool valid = sigma_x >= FLT_MIN && sigma_x <= FLT_MAX && sigma_y >= FLT_MIN && sigma_y <= FLT_MAX &&
                       rho > -1.0f && rho < 1.0f && x >= -FLT_MAX && x <= FLT_MAX && y >= -FLT_MAX && y <= FLT_MAX;
    if (!valid) return g;
    g.inv_sigma_x = 1.0f / sigma_x;
    g.inv_sigma_y = 1.0f / sigma_y;
    g.k = 1.0f / sqrtf((1.0f - rho) * (1.0f + rho));
    // Bounded, because an axis of one sample multiplies it by zero.
    const float half_x = fminf(support * sigma_x, FLT_MAX), half_y = fminf(support * sigma_y, FLT_MAX);
    int64_t first, last;
    pixel_range(x, half_x, width, &first, &last);
    g.x0 = static_cast<int32_t>(first);
    g.x1 = static_cast<int32_t>(last);
    pixel_range(y, half_y, height, &first, &last);
    g.y0 = static_cast<int32_t>(first);
    g.y1 = static_cast<int32_t>(last);
    return g;
}

// Sums over a token's pixels of s weight {q, v, q^2, q v, v^2}.
struct Moments {
    float q, v, qq, qv, vv;
};

// Writes the five geometry gradients of a token that paints something.
GPSTOKEN_INLINE void write_geometry_gradient(const Gaussian& g, const Moments& m, float* grad_geometry) {
    const float k_rho = g.k * g.rho;
    grad_geometry[0] = (m.qq + k_rho * m.qv) * g.inv_sigma_x;
    grad_geometry[1] = (m.vv - k_rho * m.qv) * g.inv_sigma_y;
    grad_geometry[2] = g.k * m.qv - g.rho * g.k * g.k * m.qq;
    grad_geometry[3] = g.k * m.q * g.inv_sigma_x;
    grad_geometry[4] = (m.v - k_rho * m.q) * g.inv_sigma_y;
}

}  // namespace gpstoken
