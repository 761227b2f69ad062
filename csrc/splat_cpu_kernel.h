// The inner loops of the CPU splat. splat_cpu.cpp includes this once per instruction set, see vector_cpu.h.
// Feature maps are channel-last here, (rows, width, padded channels), channels padded with zeros to whole vectors, so
// that one broadcast weight serves all channels of a pixel in full registers.
#include "vector_cpu.h"

// One row of a token's box: q and the weight at `count` pixels from grid_x on (rounded up to whole vectors; the grid
// is padded for that). v is the row's (py - y) / sigma_y.
GPSTOKEN_KERNEL void row_weight(const Gaussian& g, float v, const float* grid_x, int64_t i, Vector* q, Vector* weight) {
    const Vector u = (load(grid_x + i) - broadcast(g.x)) * broadcast(g.inv_sigma_x);
    *q = broadcast(g.k) * (u - broadcast(g.rho * v));
    *weight = exp_nonpositive(broadcast(-0.5f) * (*q * *q + broadcast(v * v)));
}

// Adds rows first_row..last_row of a token to a band whose first row is band_row.
// row: scratch for a row of weights.
GPSTOKEN_TARGET static void paint(const Gaussian& g, const float* texture, const Grid& grid, int64_t channels,
                                  int64_t width, int64_t band_row, int64_t first_row, int64_t last_row, float* row,
                                  float* band) {
    const int64_t count = g.x1 - g.x0 + 1;
    for (int64_t y = first_row; y <= last_row; ++y) {
        const float v = (grid.y[y] - g.y) * g.inv_sigma_y;
        for (int64_t i = 0; i < count; i += kLanes) {
            Vector q, weight;
            row_weight(g, v, grid.x + g.x0, i, &q, &weight);
            store(row + i, weight);
        }
        float* pixels = band + ((y - band_row) * width + g.x0) * channels;
        int64_t c = 0;
        for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
            const Vector t0 = load(texture + c), t1 = load(texture + c + kLanes);
            for (int64_t i = 0; i < count; ++i) {
                float* pixel = pixels + i * channels + c;
                const Vector weight = broadcast(row[i]);
                store(pixel, load(pixel) + weight * t0);
                store(pixel + kLanes, load(pixel + kLanes) + weight * t1);
            }
        }
        if (c < channels) {
            const Vector t = load(texture + c);
            for (int64_t i = 0; i < count; ++i) {
                float* pixel = pixels + i * channels + c;
                store(pixel, load(pixel) + broadcast(row[i]) * t);
            }
        }
    }
}

// A row's sums over pixels of {1, q, q^2} weight grad, for one vector of channels.
struct RowSums {
    Vector one, q, qq;
};

// What a token gathers: lanes hold partial sums over channels of the moments.
struct LaneMoments {
    Vector q, v, qq, qv, vv;
};

GPSTOKEN_KERNEL void add_row(const RowSums& r, float v, const float* texture, float* grad_texture, LaneMoments* m) {
    store(grad_texture, load(grad_texture) + r.one);
    const Vector t = load(texture), vs = broadcast(v);
    const Vector one = t * r.one, q = t * r.q;
    m->q += q;
    m->qq += t * r.qq;
    m->qv += vs * q;
    m->v += vs * one;
    m->vv += vs * vs * one;
}

// Gathers one token's gradients over its box. grad: (height, width, channels); row: scratch for three rows of floats,
// each `stride` long; grad_texture: (channels) zeros on entry.
GPSTOKEN_TARGET static Moments gather(const Gaussian& g, const float* texture, const float* grad, const Grid& grid,
                                      int64_t channels, int64_t width, float* row, int64_t stride,
                                      float* grad_texture) {
    const Vector zero = broadcast(0.0f);
    LaneMoments m = {zero, zero, zero, zero, zero};
    const int64_t count = g.x1 - g.x0 + 1;
    for (int64_t y = g.y0; y <= g.y1; ++y) {
        const float v = (grid.y[y] - g.y) * g.inv_sigma_y;
        for (int64_t i = 0; i < count; i += kLanes) {
            Vector q, weight;
            row_weight(g, v, grid.x + g.x0, i, &q, &weight);
            store(row + i, weight);
            store(row + stride + i, weight * q);
            store(row + 2 * stride + i, weight * q * q);
        }
        const float* pixels = grad + (y * width + g.x0) * channels;
        int64_t c = 0;
        for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
            RowSums a = {zero, zero, zero}, b = {zero, zero, zero};
            for (int64_t i = 0; i < count; ++i) {
                const float* pixel = pixels + i * channels + c;
                const Vector p0 = load(pixel), p1 = load(pixel + kLanes);
                const Vector one = broadcast(row[i]), q = broadcast(row[stride + i]),
                             qq = broadcast(row[2 * stride + i]);
                a.one += one * p0;
                a.q += q * p0;
                a.qq += qq * p0;
                b.one += one * p1;
                b.q += q * p1;
                b.qq += qq * p1;
            }
            add_row(a, v, texture + c, grad_texture + c, &m);
            add_row(b, v, texture + c + kLanes, grad_texture + c + kLanes, &m);
        }
        if (c < channels) {
            RowSums a = {zero, zero, zero};
            for (int64_t i = 0; i < count; ++i) {
                const Vector p = load(pixels + i * channels + c);
                a.one += broadcast(row[i]) * p;
                a.q += broadcast(row[stride + i]) * p;
                a.qq += broadcast(row[2 * stride + i]) * p;
            }
            add_row(a, v, texture + c, grad_texture + c, &m);
        }
    }
    return {sum(m.q), sum(m.v), sum(m.qq), sum(m.qv), sum(m.vv)};
}

#undef GPSTOKEN_KERNEL
