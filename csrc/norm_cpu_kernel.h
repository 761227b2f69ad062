// The inner loops of normalisation on the CPU. norm_cpu.cpp includes this once per instruction set, see vector_cpu.h.
// Maps are channel-last: a row is one pixel's channels, C of them. Per-channel arrays of floats (weights, means, sums)
// are padded to whole vectors, `padded` long; what lies behind channel C never reaches a result.
#include "vector_cpu.h"

// 1 / (1 + exp(-z)), within a few units in the last place.
GPSTOKEN_KERNEL Vector sigmoid(const Vector& z) {
#if defined(__GNUC__)
    const Integers sign_bit = (Integers)broadcast(-0.0f);
    const Vector one = broadcast(1.0f);
    const Vector e = exp_nonpositive((Vector)((Integers)z | sign_bit));  // exp(-|z|)
    const Integers negative = z < broadcast(0.0f);
    const Vector numerator = (Vector)(((Integers)e & negative) | ((Integers)one & ~negative));
    return numerator * reciprocal(one + e);
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = 1.0f / (1.0f + std::exp(-z[i]));
    return result;
#endif
}

// z sigmoid(z), or z itself.
template <bool kSilu>
GPSTOKEN_KERNEL Vector activate(const Vector& z) {
    return kSilu ? z * sigmoid(z) : z;
}

// The derivative of `activate` times grad.
template <bool kSilu>
GPSTOKEN_KERNEL Vector activate_backward(const Vector& z, const Vector& grad) {
    if (!kSilu) return grad;
    const Vector one = broadcast(1.0f), s = sigmoid(z);
    return grad * s * (one + z * (one - s));
}

// The next numbers of a row that has `left` to go, then zeros.
template <class T>
GPSTOKEN_KERNEL Vector load_part(const T* from, int64_t left) {
    if (left >= kLanes) return load(from);
    T padded[kLanes] = {};
    std::copy(from, from + left, padded);
    return load(padded);
}

template <class T>
GPSTOKEN_KERNEL void store_part(T* to, const Vector& v, int64_t left) {
    if (left >= kLanes) return store(to, v);
    T lanes[kLanes];
    store(lanes, v);
    std::copy(lanes, lanes + left, to);
}

// ---- over the channels of each pixel ----

// Loads a row and takes its mean from it. Returns 1 / sqrt(variance + eps).
template <class T>
GPSTOKEN_KERNEL float center_row(const T* x, int64_t C, int64_t padded, float eps, float* row) {
    Vector total = broadcast(0.0f), squares = broadcast(0.0f);
    for (int64_t c = 0; c < C; c += kLanes) {
        const Vector values = load_part(x + c, C - c);
        store(row + c, values);
        total += values;
    }
    const float mean = sum(total) / static_cast<float>(C);
    std::fill(row + C, row + padded, mean);  // the padding deviates by nothing
    for (int64_t c = 0; c < C; c += kLanes) {
        const Vector centered = load(row + c) - broadcast(mean);
        store(row + c, centered);
        squares += centered * centered;
    }
    return 1.0f / std::sqrt(sum(squares) / static_cast<float>(C) + eps);
}

// out = activate((x - mean) / sqrt(var + eps) * weight + bias). row: scratch, `padded` long.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void pixel_norm_rows(const T* x, const float* weight, const float* bias, T* out, int64_t rows,
                                            int64_t C, int64_t padded, float eps, float* row) {
    for (int64_t r = 0; r < rows; ++r) {
        const Vector inverse = broadcast(center_row(x + r * C, C, padded, eps, row));
        for (int64_t c = 0; c < C; c += kLanes)
            store_part(out + r * C + c, activate<kSilu>(load(row + c) * inverse * load(weight + c) + load(bias + c)),
                       C - c);
    }
}

// grad_x of these rows; adds to grad_weight and grad_bias, `padded` long. row: scratch for two rows.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void pixel_norm_backward_rows(const T* x, const float* weight, const float* bias,
                                                     const T* grad_out, T* grad_x, float* grad_weight,
                                                     float* grad_bias, int64_t rows, int64_t C, int64_t padded,
                                                     float eps, float* row) {
    float* grad = row + padded;
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = center_row(x + r * C, C, padded, eps, row);
        Vector total = broadcast(0.0f), along = broadcast(0.0f);
        for (int64_t c = 0; c < C; c += kLanes) {
            const Vector normed = load(row + c) * broadcast(inverse), w = load(weight + c);
            const Vector grad_there = load_part(grad_out + r * C + c, C - c);
            const Vector g = activate_backward<kSilu>(normed * w + load(bias + c), grad_there);
            store(grad_weight + c, load(grad_weight + c) + g * normed);
            store(grad_bias + c, load(grad_bias + c) + g);
            store(row + c, normed);
            store(grad + c, g * w);
            total += g * w;
            along += g * w * normed;
        }
        const Vector mean = broadcast(sum(total) / static_cast<float>(C));
        const Vector slope = broadcast(sum(along) / static_cast<float>(C));
        for (int64_t c = 0; c < C; c += kLanes)
            store_part(grad_x + r * C + c, broadcast(inverse) * (load(grad + c) - mean - load(row + c) * slope), C - c);
    }
}

// ---- over pixels, with the same figures for every pixel of an image ----

// Of a few vectors of channels, `left` channels at most: the mean over `rows` pixels and the sum of squares around it.
template <int kVectors, class T>
GPSTOKEN_KERNEL void vector_moments(const T* x, int64_t rows, int64_t C, int64_t left, double* mean, double* squares) {
    constexpr int kChannels = kVectors * kLanes;
    Vector center[kVectors], total[kVectors];
    float from[kChannels], sums[kChannels];
    // Sums of differences from the first pixel: where the mean is large, those of the values would round.
    for (int v = 0; v < kVectors; ++v) {
        center[v] = load_part(x + v * kLanes, left - v * kLanes);
        total[v] = broadcast(0.0f);
    }
    for (int64_t r = 1; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v)
            total[v] += load_part(x + r * C + v * kLanes, left - v * kLanes) - center[v];
    for (int v = 0; v < kVectors; ++v) {
        store(from + v * kLanes, center[v]);
        store(sums + v * kLanes, total[v]);
    }
    const double count = static_cast<double>(rows);
    for (int i = 0; i < kChannels; ++i) mean[i] = from[i] + sums[i] / count;

    for (int i = 0; i < kChannels; ++i) from[i] = static_cast<float>(mean[i]);
    for (int v = 0; v < kVectors; ++v) {
        center[v] = load(from + v * kLanes);
        total[v] = broadcast(0.0f);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            const Vector centered = load_part(x + r * C + v * kLanes, left - v * kLanes) - center[v];
            total[v] += centered * centered;
        }
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, total[v]);
    for (int i = 0; i < kChannels; ++i) {
        const double shift = from[i] - mean[i];  // they were taken around the mean rounded to float32
        squares[i] = sums[i] - count * shift * shift;
    }
}

// The moments of each channel over `rows` pixels.
template <class T>
GPSTOKEN_TARGET static void channel_moments(const T* x, int64_t rows, int64_t C, Moments* of) {
    constexpr int kAtOnce = 4;
    of->count = static_cast<double>(rows);
    int64_t c = 0;
    for (; c + kAtOnce * kLanes <= C; c += kAtOnce * kLanes)
        vector_moments<kAtOnce>(x + c, rows, C, kAtOnce * kLanes, of->mean + c, of->squares + c);
    for (; c < C; c += kLanes) vector_moments<1>(x + c, rows, C, C - c, of->mean + c, of->squares + c);
}

// Those of disjoint sets of pixels become those of their union (T. Chan, G. Golub and R. LeVeque, 1979).
GPSTOKEN_TARGET static void add_moments(const Moments& more, int64_t C, Moments* to) {
    const double share = more.count / (to->count + more.count), weight = to->count * share;
    for (int64_t c = 0; c < C; ++c) {
        const double delta = more.mean[c] - to->mean[c];
        to->squares[c] += more.squares[c] + weight * delta * delta;
        to->mean[c] += share * delta;
    }
    to->count += more.count;
}

// out = activate((x - mean) * scale + bias), per channel.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void channel_norm_rows(const T* x, const float* mean, const float* scale, const float* bias,
                                              T* out, int64_t rows, int64_t C) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < C; c += kLanes) {
            const Vector centered = load_part(x + r * C + c, C - c) - load(mean + c);
            store_part(out + r * C + c, activate<kSilu>(centered * load(scale + c) + load(bias + c)), C - c);
        }
}

// ---- over the pixels of tiles, with figures that vary along a row ----

// out = activate((x - mean) / (max(std, floor) + eps) * weight + bias) for a row of pixels, where mean and std are
// interpolated between columns of tiles: four of them count for a pixel, `tiles` says which and `shares` how much.
// means, stds: (cols, padded).
template <class T, bool kSilu>
GPSTOKEN_TARGET static void tile_norm_row(const T* x, const float* means, const float* stds, const float* floor,
                                          const int32_t* tiles, const float* shares, const float* weight,
                                          const float* bias, float eps, T* out, int64_t width, int64_t C,
                                          int64_t padded) {
    for (int64_t i = 0; i < width; ++i)
        for (int64_t c = 0; c < C; c += kLanes) {
            Vector mean = broadcast(0.0f), std = broadcast(0.0f);
            for (int k = 0; k < 4; ++k) {
                const Vector share = broadcast(shares[4 * i + k]);
                mean += share * load(means + tiles[4 * i + k] * padded + c);
                std += share * load(stds + tiles[4 * i + k] * padded + c);
            }
            const Vector deviation = larger(std, load(floor + c)) + broadcast(eps);
            const Vector scale = quotient(load(weight + c), deviation);
            const Vector centered = load_part(x + i * C + c, C - c) - mean;
            store_part(out + i * C + c, activate<kSilu>(centered * scale + load(bias + c)), C - c);
        }
}

// ---- gradients ----

// Adds, per channel, the gradient at the activation's input to `sums`, and that times (x - mean) to `along`.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void channel_norm_sums(const T* x, const T* grad_out, const float* mean, const float* scale,
                                              const float* bias, int64_t rows, int64_t C, float* sums, float* along) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < C; c += kLanes) {
            const Vector centered = load_part(x + r * C + c, C - c) - load(mean + c);
            const Vector grad = load_part(grad_out + r * C + c, C - c);
            const Vector g = activate_backward<kSilu>(centered * load(scale + c) + load(bias + c), grad);
            store(sums + c, load(sums + c) + g);
            store(along + c, load(along + c) + g * centered);
        }
}

// grad_x = scale * gradient at the activation's input + offset + slope * (x - mean), per channel.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void channel_norm_backward_rows(const T* x, const T* grad_out, const float* mean,
                                                       const float* scale, const float* bias, const float* offset,
                                                       const float* slope, T* grad_x, int64_t rows, int64_t C) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < C; c += kLanes) {
            const Vector centered = load_part(x + r * C + c, C - c) - load(mean + c), s = load(scale + c);
            const Vector grad = load_part(grad_out + r * C + c, C - c);
            const Vector g = activate_backward<kSilu>(centered * s + load(bias + c), grad);
            store_part(grad_x + r * C + c, s * g + load(offset + c) + load(slope + c) * centered, C - c);
        }
}

#undef GPSTOKEN_KERNEL
