// The inner loops of RoIAlign on the CPU. roi_align_cpu.cpp includes this once per instruction set, see vector_cpu.h.
// Maps are channel-last, cells are not: (C, bins, bins) of each region. So kBlock channels at a time are gathered as
// vectors over channels, then turned over. Bilinear weights are products of one along each axis: reading first down the
// columns of a region, then across what that leaves, takes half the multiplications of four weights per sample.
#include "vector_cpu.h"

constexpr int kParts = static_cast<int>(kBlock) / kLanes;

struct Channels {
    Vector part[kParts];
};

GPSTOKEN_KERNEL Channels no_channels() {
    Channels none;
    for (int p = 0; p < kParts; ++p) none.part[p] = broadcast(0.0f);
    return none;
}

GPSTOKEN_KERNEL Channels load_channels(const float* from) {
    Channels values;
    for (int p = 0; p < kParts; ++p) values.part[p] = load(from + p * kLanes);
    return values;
}

// The first `channels` of a block, the others 0.
template <bool kWhole, class T>
GPSTOKEN_KERNEL Channels load_channels(const T* from, int64_t channels) {
    float values[kBlock] = {};
    if (kWhole)
        for (int64_t c = 0; c < kBlock; ++c) values[c] = to_float(from[c]);
    else
        for (int64_t c = 0; c < channels; ++c) values[c] = to_float(from[c]);
    return load_channels(values);
}

GPSTOKEN_KERNEL void store_channels(float* to, const Channels& values) {
    for (int p = 0; p < kParts; ++p) store(to + p * kLanes, values.part[p]);
}

GPSTOKEN_KERNEL void add_times(Channels& sum, float weight, const Channels& values) {
    for (int p = 0; p < kParts; ++p) sum.part[p] += broadcast(weight) * values.part[p];
}

// ---- between blocks (cells, kBlock) and the caller's cells, (channels, cells) ----

// The first halves of two vectors, or the second ones, lane by lane in turns.
GPSTOKEN_KERNEL Vector interleave(const Vector& a, const Vector& b, bool second) {
#if defined(__GNUC__) && !defined(__clang__)
    Integers lanes;  // of a, then of b; GCC does not make shuffles of the loop below
    for (int i = 0; i < kLanes; ++i) lanes[i] = i % 2 * kLanes + i / 2 + (second ? kLanes / 2 : 0);
    return __builtin_shuffle(a, b, lanes);
#else
    float from[2][kLanes], to[kLanes];
    store(from[0], a);
    store(from[1], b);
    for (int i = 0; i < kLanes; ++i) to[i] = from[i % 2][i / 2 + (second ? kLanes / 2 : 0)];
    return load(to);
#endif
}

// Rows become columns. Of a number's address, row before lane, one round moves the first bit to the end; a round for
// each bit of the row leaves lane before row.
GPSTOKEN_KERNEL void transpose(Vector* rows) {
    for (int round = 1; round < kLanes; round *= 2) {
        Vector mixed[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            mixed[2 * i] = interleave(rows[i], rows[i + kLanes / 2], false);
            mixed[2 * i + 1] = interleave(rows[i], rows[i + kLanes / 2], true);
        }
        for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
    }
}

// The next `left` numbers, a vector's worth at most. Compilers make one instruction of the usual case.
template <class T>
GPSTOKEN_KERNEL void copy_lanes(const T* from, int64_t left, T* to) {
    if (left >= kLanes)
        memcpy(to, from, kLanes * sizeof(T));
    else
        std::copy(from, from + left, to);
}

// block has room for whole vectors of cells.
template <class T>
GPSTOKEN_KERNEL void store_turned(const float* block, int64_t count, int64_t channels, T* cells) {
    for (int64_t c = 0; c < channels; c += kLanes)
        for (int64_t k = 0; k < count; k += kLanes) {
            Vector rows[kLanes];
            for (int i = 0; i < kLanes; ++i) rows[i] = load(block + (k + i) * kBlock + c);
            transpose(rows);
            for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels - c); ++i) {
                float lanes[kLanes];
                T rounded[kLanes];
                store(lanes, rows[i]);
                for (int j = 0; j < kLanes; ++j) rounded[j] = from_float<T>(lanes[j]);
                copy_lanes(rounded, count - k, cells + (c + i) * count + k);
            }
        }
}

// The same way back; channels that are not there become 0.
template <class T>
GPSTOKEN_KERNEL void load_turned(const T* cells, int64_t count, int64_t channels, float* block) {
    for (int64_t c = 0; c < kBlock; c += kLanes)
        for (int64_t k = 0; k < count; k += kLanes) {
            Vector rows[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                T rounded[kLanes] = {};
                float lanes[kLanes];
                if (c + i < channels) copy_lanes(cells + (c + i) * count + k, count - k, rounded);
                for (int j = 0; j < kLanes; ++j) lanes[j] = to_float(rounded[j]);
                rows[i] = load(lanes);
            }
            transpose(rows);
            for (int i = 0; i < kLanes; ++i) store(block + (k + i) * kBlock + c, rows[i]);
        }
}

// ---- forward ----

// One block of channels of one region. image: its pixel 0; columns: scratch for as many blocks as the map has columns;
// block: the cells, (bins * bins, kBlock).
template <bool kWhole, class T>
GPSTOKEN_KERNEL void read_block(const T* image, int64_t W, int64_t C, int64_t channels, const Axis& down,
                                const Axis& across, float* columns, float* block) {
    for (int64_t i = 0; i < down.bins; ++i) {
        const Band rows = down.band(i);
        for (int64_t x = across.begin; x < across.end; ++x) {
            Channels sum = no_channels();
            const T* pixel = image + (rows.first * W + x) * C;
            for (int64_t k = 0; k < rows.count; ++k)
                add_times(sum, rows.weights[k], load_channels<kWhole>(pixel + k * W * C, channels));
            store_channels(columns + x * kBlock, sum);
        }
        for (int64_t j = 0; j < across.bins; ++j) {
            const Band cols = across.band(j);
            Channels sum = no_channels();
            for (int64_t k = 0; k < cols.count; ++k)
                add_times(sum, cols.weights[k], load_channels(columns + (cols.first + k) * kBlock));
            store_channels(block + (i * across.bins + j) * kBlock, sum);
        }
    }
}

// image (H, W, C) -> cells (C, bins, bins) of one region.
template <class T>
GPSTOKEN_TARGET static void read_region(const T* image, int64_t W, int64_t C, const Axis& down, const Axis& across,
                                        T* cells, float* columns, float* block) {
    const int64_t count = down.bins * across.bins;
    for (int64_t first = 0; first < C; first += kBlock) {
        const int64_t channels = std::min(kBlock, C - first);
        if (channels == kBlock)
            read_block<true>(image + first, W, C, channels, down, across, columns, block);
        else
            read_block<false>(image + first, W, C, channels, down, across, columns, block);
        store_turned(block, count, channels, cells + first * count);
    }
}

// ---- backward ----

// Adds the gradients of one region's cells to those of the map: of `channels` channels, from the first that the
// pointers point to. sums: of pixel 0, pixels lie `stride` floats apart, whole blocks of channels may be written.
template <class T>
GPSTOKEN_TARGET static void add_region(const T* grad_cells, int64_t W, int64_t channels, const Axis& down,
                                       const Axis& across, float* sums, int64_t stride, float* columns, float* block) {
    const int64_t count = down.bins * across.bins;
    for (int64_t first = 0; first < channels; first += kBlock) {
        load_turned(grad_cells + first * count, count, std::min(kBlock, channels - first), block);
        for (int64_t i = 0; i < down.bins; ++i) {
            std::fill(columns + across.begin * kBlock, columns + across.end * kBlock, 0.0f);
            for (int64_t j = 0; j < across.bins; ++j) {
                const Band cols = across.band(j);
                const Channels grad = load_channels(block + (i * across.bins + j) * kBlock);
                for (int64_t k = 0; k < cols.count; ++k) {
                    float* column = columns + (cols.first + k) * kBlock;
                    Channels sum = load_channels(column);
                    add_times(sum, cols.weights[k], grad);
                    store_channels(column, sum);
                }
            }
            const Band rows = down.band(i);
            for (int64_t k = 0; k < rows.count; ++k)
                for (int64_t x = across.begin; x < across.end; ++x) {
                    float* pixel = sums + ((rows.first + k) * W + x) * stride + first;
                    Channels sum = load_channels(pixel);
                    add_times(sum, rows.weights[k], load_channels(columns + x * kBlock));
                    store_channels(pixel, sum);
                }
        }
    }
}

#undef GPSTOKEN_KERNEL
