// The inner loops of normalisation on the CPU. norm_cpu.cpp includes this once per instruction set, see vector_cpu.h.
// Maps are channel-last: a row is one pixel's channels, C of them. Per-channel arrays of floats (weights, means, sums)
// are padded to whole vectors, `padded` long; what lies behind channel C never reaches a result.
#include "vector_cpu.h"

// 1 / (1 + exp(-z)), within a few units in the last place or, kRough, a tenth of bfloat16's. 0 below -86, where it
// would leave the normal numbers; any number where z is none.
template <bool kRough>
GPSTOKEN_KERNEL Vector sigmoid(const Vector& z) {
#if defined(__GNUC__)
    const Vector x = broadcast(1.0f) + exp_normal<kRough ? 4 : 7>(-limited(z, broadcast(86.0f)));
    const Vector s = kRough ? rough_reciprocal(x) : reciprocal(x);
    return (Vector)((Integers)s & ~(z < broadcast(-86.0f)));
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = 1.0f / (1.0f + std::exp(-z[i]));
    return result;
#endif
}

// z sigmoid(z), or z itself, for maps of type T.
template <class T, bool kSilu>
GPSTOKEN_KERNEL Vector activate(const Vector& z) {
    return kSilu ? z * sigmoid<std::is_same<T, BFloat16>::value>(z) : z;
}

// The derivative of `activate` times grad.
template <bool kSilu>
GPSTOKEN_KERNEL Vector activate_backward(const Vector& z, const Vector& grad) {
    if (!kSilu) return grad;
    const Vector one = broadcast(1.0f), s = sigmoid<false>(z);
    return grad * s * (one + z * (one - s));
}

// The next numbers of a row that has `left` to go, then `fill`.
template <class T>
GPSTOKEN_KERNEL Vector load_part(const T* from, int64_t left, float fill = 0.0f) {
    if (left >= kLanes) return load(from);
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < left ? to_float(from[i]) : fill;
    return load(lanes);
}

template <class T>
GPSTOKEN_KERNEL void store_part(T* to, const Vector& v, int64_t left) {
    if (left >= kLanes) return store(to, v);
    T lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i)
        if (i < left) to[i] = lanes[i];
}

// ---- over the channels of each pixel ----

struct RowFigures {
    float mean, inverse;  // 1 / sqrt(variance + eps)
};

template <class T>
GPSTOKEN_KERNEL RowFigures row_figures(const T* x, int64_t C, float eps) {
    Vector total = broadcast(0.0f), squares = broadcast(0.0f);
    for (int64_t c = 0; c < C; c += kLanes) total += load_part(x + c, C - c);
    const float mean = sum(total) / static_cast<float>(C);
    for (int64_t c = 0; c < C; c += kLanes) {
        const Vector centered = load_part(x + c, C - c, mean) - broadcast(mean);
        squares += centered * centered;
    }
    return {mean, 1.0f / std::sqrt(sum(squares) / static_cast<float>(C) + eps)};
}

// out = activate((x - mean) / sqrt(var + eps) * weight + bias).
template <class T, bool kSilu>
GPSTOKEN_TARGET static void pixel_norm_rows(const T* x, const float* weight, const float* bias, T* out, int64_t rows,
                                            int64_t C, float eps) {
    // A row's figures wait for sums, a root and divisions; those of several rows wait together.
    constexpr int64_t kAtOnce = 8;
    for (int64_t first = 0; first < rows; first += kAtOnce) {
        const int64_t end = std::min(first + kAtOnce, rows);
        RowFigures figures[kAtOnce];
        for (int64_t r = first; r < end; ++r) figures[r - first] = row_figures(x + r * C, C, eps);
        for (int64_t r = first; r < end; ++r) {
            const Vector mean = broadcast(figures[r - first].mean), inverse = broadcast(figures[r - first].inverse);
            for (int64_t c = 0; c < C; c += kLanes) {
                const Vector normed = (load_part(x + r * C + c, C - c) - mean) * inverse;
                store_part(out + r * C + c, activate<T, kSilu>(normed * load(weight + c) + load(bias + c)), C - c);
            }
        }
    }
}

// grad_x of these rows; adds to grad_weight and grad_bias, `padded` long. row: scratch for two rows.
template <class T, bool kSilu>
GPSTOKEN_TARGET static void pixel_norm_backward_rows(const T* x, const float* weight, const float* bias,
                                                     const T* grad_out, T* grad_x, float* grad_weight, float* grad_bias,
                                                     int64_t rows, int64_t C, int64_t padded, float eps, float* row) {
    float* grad = row + padded;
    for (int64_t r = 0; r < rows; ++r) {
        const RowFigures figures = row_figures(x + r * C, C, eps);
        const Vector center = broadcast(figures.mean), inverse = broadcast(figures.inverse);
        Vector total = broadcast(0.0f), along = broadcast(0.0f);
        for (int64_t c = 0; c < C; c += kLanes) {
            const Vector normed = (load_part(x + r * C + c, C - c, figures.mean) - center) * inverse;
            const Vector w = load(weight + c), arriving = load_part(grad_out + r * C + c, C - c);
            const Vector g = activate_backward<kSilu>(normed * w + load(bias + c), arriving);
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
            store_part(grad_x + r * C + c, inverse * (load(grad + c) - mean - load(row + c) * slope), C - c);
    }
}

// ---- over pixels, with the same figures for every pixel of an image ----

// Adds `rows` pixels to the moments of a few vectors of channels, of which `left` channels are there.
template <int kVectors, class T>
GPSTOKEN_KERNEL void add_vectors(const T* x, int64_t rows, int64_t C, int64_t left, double before, double* mean,
                                 double* squares) {
    constexpr int kChannels = kVectors * kLanes;
    float around[kChannels], sums[kChannels], squared[kChannels];
    for (int i = 0; i < kChannels; ++i) around[i] = static_cast<float>(mean[i]);
    Vector center[kVectors], total[kVectors], square[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        center[v] = load(around + v * kLanes);
        total[v] = square[v] = broadcast(0.0f);
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            const Vector centered = load_part(x + r * C + v * kLanes, left - v * kLanes) - center[v];
            total[v] += centered;
            square[v] += centered * centered;
        }
    for (int v = 0; v < kVectors; ++v) {
        store(sums + v * kLanes, total[v]);
        store(squared + v * kLanes, square[v]);
    }
    const double count = static_cast<double>(rows), each = 1.0 / count, share = count / (before + count);
    for (int i = 0; i < kChannels; ++i) {
        const double offset = sums[i] * each, delta = around[i] + offset - mean[i];
        squares[i] += squared[i] - sums[i] * offset + before * share * delta * delta;
        mean[i] += share * delta;
    }
}

// Adds `rows` pixels to the moments of each channel, if any are there, to those of about as many pixels or more.
//
// One pass serves: it sums squares around the mean so far. Around their own mean the sum would be smaller, but by no
// more than a few times what the two means' distance adds to the result, so little can cancel. The first pixels have no
// mean before them and are taken twice; the first time around one of them, for the mean alone: where that is large,
// sums of the values themselves would round.
template <class T>
GPSTOKEN_TARGET static void add_pixels(const T* x, int64_t rows, int64_t C, Moments* to) {
    constexpr int kAtOnce = 4;
    if (to->count == 0.0)
        for (int64_t c = 0; c < C; ++c) to->mean[c] = to_float(x[c]);
    for (int pass = to->count == 0.0 ? 0 : 1; pass < 2; ++pass) {
        int64_t c = 0;
        for (; c + kAtOnce * kLanes <= C; c += kAtOnce * kLanes)
            add_vectors<kAtOnce>(x + c, rows, C, kAtOnce * kLanes, to->count, to->mean + c, to->squares + c);
        for (; c < C; c += kLanes) add_vectors<1>(x + c, rows, C, C - c, to->count, to->mean + c, to->squares + c);
        if (pass == 0) std::fill(to->squares, to->squares + C, 0.0);
    }
    to->count += static_cast<double>(rows);
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
            store_part(out + r * C + c, activate<T, kSilu>(centered * load(scale + c) + load(bias + c)), C - c);
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
            store_part(out + i * C + c, activate<T, kSilu>(centered * scale + load(bias + c)), C - c);
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
