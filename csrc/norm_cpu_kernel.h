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
GPSTOKEN_KERNEL Vector activate(const Vector& z, bool silu) { return silu ? z * sigmoid(z) : z; }

// The derivative of `activate` times grad.
GPSTOKEN_KERNEL Vector activate_backward(const Vector& z, const Vector& grad, bool silu) {
    if (!silu) return grad;
    const Vector one = broadcast(1.0f), s = sigmoid(z);
    return grad * s * (one + z * (one - s));
}

// A row as floats; the padding gets `fill`.
template <class T>
GPSTOKEN_KERNEL void load_row(const T* from, int64_t C, int64_t padded, float fill, float* to) {
    for (int64_t c = 0; c < C; ++c) to[c] = to_float(from[c]);
    for (int64_t c = C; c < padded; ++c) to[c] = fill;
}

template <class T>
GPSTOKEN_KERNEL void store_row(const float* from, int64_t C, T* to) {
    for (int64_t c = 0; c < C; ++c) to[c] = from_float<T>(from[c]);
}

GPSTOKEN_KERNEL float sum_row(const float* row, int64_t padded) {
    Vector total = broadcast(0.0f);
    for (int64_t c = 0; c < padded; c += kLanes) total += load(row + c);
    return sum(total);
}

// ---- over the channels of each pixel ----

// Loads a row and takes its mean from it. Returns 1 / sqrt(variance + eps).
template <class T>
GPSTOKEN_KERNEL float center_row(const T* x, int64_t C, int64_t padded, float eps, float* row) {
    load_row(x, C, padded, 0.0f, row);
    const Vector mean = broadcast(sum_row(row, padded) / static_cast<float>(C));
    Vector squares = broadcast(0.0f);
    for (int64_t c = 0; c < padded; c += kLanes) {
        const Vector centered = load(row + c) - mean;
        store(row + c, centered);
        squares += centered * centered;
    }
    // The padding held 0, and so -mean.
    float total = sum(squares);
    if (padded > C) {
        total = 0.0f;
        for (int64_t c = C; c < padded; ++c) row[c] = 0.0f;
        for (int64_t c = 0; c < padded; ++c) total += row[c] * row[c];
    }
    return 1.0f / std::sqrt(total / static_cast<float>(C) + eps);
}

// out = activate((x - mean) / sqrt(var + eps) * weight + bias). row: scratch, `padded` long.
template <class T>
GPSTOKEN_TARGET static void pixel_norm_rows(const T* x, const float* weight, const float* bias, T* out, int64_t rows,
                                            int64_t C, int64_t padded, float eps, bool silu, float* row) {
    for (int64_t r = 0; r < rows; ++r) {
        const Vector inverse = broadcast(center_row(x + r * C, C, padded, eps, row));
        for (int64_t c = 0; c < padded; c += kLanes)
            store(row + c, activate(load(row + c) * inverse * load(weight + c) + load(bias + c), silu));
        store_row(row, C, out + r * C);
    }
}

// grad_x of these rows; adds to grad_weight and grad_bias, `padded` long. row: scratch for two rows.
template <class T>
GPSTOKEN_TARGET static void pixel_norm_backward_rows(const T* x, const float* weight, const float* bias,
                                                     const T* grad_out, T* grad_x, float* grad_weight,
                                                     float* grad_bias, int64_t rows, int64_t C, int64_t padded,
                                                     float eps, bool silu, float* row) {
    float* grad = row + padded;
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = center_row(x + r * C, C, padded, eps, row);
        load_row(grad_out + r * C, C, padded, 0.0f, grad);
        Vector total = broadcast(0.0f), along = broadcast(0.0f);
        for (int64_t c = 0; c < padded; c += kLanes) {
            const Vector normed = load(row + c) * broadcast(inverse), w = load(weight + c);
            const Vector g = activate_backward(normed * w + load(bias + c), load(grad + c), silu);
            store(grad_weight + c, load(grad_weight + c) + g * normed);
            store(grad_bias + c, load(grad_bias + c) + g);
            store(row + c, normed);
            store(grad + c, g * w);
            total += g * w;
            along += g * w * normed;
        }
        const Vector mean = broadcast(sum(total) / static_cast<float>(C));
        const Vector slope = broadcast(sum(along) / static_cast<float>(C));
        for (int64_t c = 0; c < padded; c += kLanes)
            store(grad + c, broadcast(inverse) * (load(grad + c) - mean - load(row + c) * slope));
        store_row(grad, C, grad_x + r * C);
    }
}

// ---- over pixels, with the same figures for every pixel of an image ----

// Of `rows` pixels, for each group of C / G channels: the mean, and the sum of squares around it.
// row: scratch for three rows.
template <class T>
GPSTOKEN_TARGET static void group_moments(const T* x, int64_t rows, int64_t C, int64_t padded, int64_t G, float* row,
                                          double* mean, double* squares) {
    float *sums = row + padded, *means = row + 2 * padded;
    const int64_t size = C / G;
    // Sums of differences from the first pixel: where the mean is large, those of the values would round.
    load_row(x, C, padded, 0.0f, means);
    std::fill(sums, sums + padded, 0.0f);
    for (int64_t r = 1; r < rows; ++r) {
        load_row(x + r * C, C, padded, 0.0f, row);
        for (int64_t c = 0; c < padded; c += kLanes) store(sums + c, load(sums + c) + (load(row + c) - load(means + c)));
    }
    for (int64_t g = 0; g < G; ++g) {
        double total = 0.0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) total += sums[c] + static_cast<double>(rows) * means[c];
        mean[g] = total / static_cast<double>(rows * size);
        for (int64_t c = g * size; c < (g + 1) * size; ++c) means[c] = static_cast<float>(mean[g]);
    }
    std::fill(sums, sums + padded, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
        load_row(x + r * C, C, padded, 0.0f, row);
        for (int64_t c = 0; c < padded; c += kLanes) {
            const Vector centered = load(row + c) - load(means + c);
            store(sums + c, load(sums + c) + centered * centered);
        }
    }
    for (int64_t g = 0; g < G; ++g) {
        // They were taken around the mean rounded to float32.
        const double shift = means[g * size] - mean[g];
        squares[g] = -shift * shift * static_cast<double>(rows * size);
        for (int64_t c = g * size; c < (g + 1) * size; ++c) squares[g] += sums[c];
    }
}

// out = activate((x - mean) * scale + bias), per channel. row: scratch, `padded` long.
template <class T>
GPSTOKEN_TARGET static void channel_norm_rows(const T* x, const float* mean, const float* scale, const float* bias,
                                              T* out, int64_t rows, int64_t C, int64_t padded, bool silu, float* row) {
    for (int64_t r = 0; r < rows; ++r) {
        load_row(x + r * C, C, padded, 0.0f, row);
        for (int64_t c = 0; c < padded; c += kLanes)
            store(row + c, activate((load(row + c) - load(mean + c)) * load(scale + c) + load(bias + c), silu));
        store_row(row, C, out + r * C);
    }
}

// ---- over the pixels of tiles, with figures that vary along a row ----

// out = activate((x - mean) / (max(std, floor) + eps) * weight + bias) for a row of pixels, where mean and std are
// interpolated between columns of tiles: four of them count for a pixel, `tiles` says which and `shares` how much.
// means, stds: (cols, padded); row: scratch, `padded` long.
template <class T>
GPSTOKEN_TARGET static void tile_norm_row(const T* x, const float* means, const float* stds, const float* floor,
                                          const int32_t* tiles, const float* shares, const float* weight,
                                          const float* bias, float eps, T* out, int64_t width, int64_t C,
                                          int64_t padded, bool silu, float* row) {
    for (int64_t i = 0; i < width; ++i) {
        load_row(x + i * C, C, padded, 0.0f, row);
        for (int64_t c = 0; c < padded; c += kLanes) {
            Vector mean = broadcast(0.0f), std = broadcast(0.0f);
            for (int k = 0; k < 4; ++k) {
                const Vector share = broadcast(shares[4 * i + k]);
                mean += share * load(means + tiles[4 * i + k] * padded + c);
                std += share * load(stds + tiles[4 * i + k] * padded + c);
            }
            const Vector deviation = larger(std, load(floor + c)) + broadcast(eps);
            const Vector scale = quotient(load(weight + c), deviation);
            store(row + c, activate((load(row + c) - mean) * scale + load(bias + c), silu));
        }
        store_row(row, C, out + i * C);
    }
}

// ---- gradients ----

// Adds, per channel, the gradient at the activation's input to `sums`, and that times (x - mean) to `along`.
// row: scratch for two rows.
template <class T>
GPSTOKEN_TARGET static void channel_norm_sums(const T* x, const T* grad_out, const float* mean, const float* scale,
                                              const float* bias, int64_t rows, int64_t C, int64_t padded, bool silu,
                                              float* row, float* sums, float* along) {
    float* grad = row + padded;
    for (int64_t r = 0; r < rows; ++r) {
        load_row(x + r * C, C, padded, 0.0f, row);
        load_row(grad_out + r * C, C, padded, 0.0f, grad);
        for (int64_t c = 0; c < padded; c += kLanes) {
            const Vector centered = load(row + c) - load(mean + c);
            const Vector g = activate_backward(centered * load(scale + c) + load(bias + c), load(grad + c), silu);
            store(sums + c, load(sums + c) + g);
            store(along + c, load(along + c) + g * centered);
        }
    }
}

// grad_x = scale * gradient at the activation's input + offset + slope * (x - mean), per channel.
// row: scratch for two rows.
template <class T>
GPSTOKEN_TARGET static void channel_norm_backward_rows(const T* x, const T* grad_out, const float* mean,
                                                       const float* scale, const float* bias, const float* offset,
                                                       const float* slope, T* grad_x, int64_t rows, int64_t C,
                                                       int64_t padded, bool silu, float* row) {
    float* grad = row + padded;
    for (int64_t r = 0; r < rows; ++r) {
        load_row(x + r * C, C, padded, 0.0f, row);
        load_row(grad_out + r * C, C, padded, 0.0f, grad);
        for (int64_t c = 0; c < padded; c += kLanes) {
            const Vector centered = load(row + c) - load(mean + c), s = load(scale + c);
            const Vector g = activate_backward(centered * s + load(bias + c), load(grad + c), silu);
            store(grad + c, s * g + load(offset + c) + load(slope + c) * centered);
        }
        store_row(grad, C, grad_x + r * C);
    }
}

#undef GPSTOKEN_KERNEL
