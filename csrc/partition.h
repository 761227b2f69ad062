// How complex a region is, on the CPU: the entropy of the magnitudes of its gradients. The reference is
// gradient_entropy in gpstoken_diffusers/ops/partition_reference.py; here is what it shares with the fast loops of
// partition_cpu_kernel.h.
//
// Only the bin of each magnitude matters, so the loops compute magnitudes in float32, in whatever order is fast, and
// leave those that lie too near a bin's edge to exact_bin(), which repeats the reference's arithmetic. The counts,
// and with them the complexities, are therefore the reference's, bit for bit, on every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "partition_shared.h"

namespace gpstoken {

// Stands for a bin that exact_bin() must find. Grey values in [-1, 1] give magnitudes up to sqrt(20): bins up to 208.
constexpr uint8_t kDoubtful = 255;
constexpr int kMaxSources = 2 * kSamples;  // pixels of one axis that its samples touch

// Bilinear resampling of one axis to kSamples samples, and its composition with the two factors of the Sobel filter
// (1 2 1 and -1 0 1 over neighbouring samples, the outermost sample repeated).
struct Axis {
    explicit Axis(int size);

    int lower[kSamples], upper[kSamples];  // the pixels that a sample lies between
    float weight[kSamples];                // of the upper one

    // The pixels that occur above, in rising order, and each sample's filters over `taps` consecutive ones of them.
    int sources = 0, taps = 0;
    int source[kMaxSources];
    int first[kSamples];
    float smooth[kSamples][6], differ[kSamples][6];

    // A size of 8, 16, 32 or 64 has 64 / size phases: samples f, f + phases, f + 2 phases, ... have the same filters
    // over the pixel before, at and after their own. Then phase_size is the size, else 0.
    int phase_size = 0;
    float phase_smooth[8][3] = {}, phase_differ[8][3] = {};

    // The sample in each column of the loops' arrays, which put phase after phase.
    int column[kSamples];
};

inline Axis::Axis(int size) {
    int lower_place[kSamples], upper_place[kSamples];  // in `source`
    for (int i = 0; i < kSamples; ++i) {
        double position = (i + 0.5) * (static_cast<double>(size) / kSamples) - 0.5;
        position = std::min(std::max(position, 0.0), static_cast<double>(size - 1));
        lower[i] = static_cast<int>(position);
        upper[i] = std::min(lower[i] + 1, size - 1);
        weight[i] = static_cast<float>(position - lower[i]);
        const auto place = [this](int pixel) {
            for (int s = sources - 1; s >= 0 && source[s] >= pixel; --s)
                if (source[s] == pixel) return s;
            source[sources] = pixel;
            return sources++;
        };
        lower_place[i] = place(lower[i]);
        upper_place[i] = place(upper[i]);
    }

    // Three neighbouring samples span at most one pixel, two, or more.
    taps = size <= kSamples / 2 ? 3 : size <= kSamples ? 4 : 6;
    for (int i = 0; i < kSamples; ++i) {
        first[i] = std::max(0, std::min(lower_place[std::max(i - 1, 0)], sources - taps));
        std::fill(smooth[i], smooth[i] + 6, 0.0f);
        std::fill(differ[i], differ[i] + 6, 0.0f);
        for (int offset = -1; offset <= 1; ++offset) {
            const int n = std::min(std::max(i + offset, 0), kSamples - 1);
            const auto add = [&](int place, float share) {
                if (share == 0.0f) return;  // may lie beyond the taps
                smooth[i][place - first[i]] += (offset == 0 ? 2.0f : 1.0f) * share;
                differ[i][place - first[i]] += static_cast<float>(offset) * share;
            };
            add(lower_place[n], 1.0f - weight[n]);
            add(upper_place[n], weight[n]);
        }
    }

    const bool phased = size >= 8 && size <= kSamples && kSamples % size == 0;
    const int phases = phased ? kSamples / size : 1;
    for (int c = 0; c < kSamples; ++c) column[c] = phased ? c % size * phases + c / size : c;
    if (!phased) return;
    phase_size = size;
    for (int f = 0; f < phases; ++f)
        for (int offset = -1; offset <= 1; ++offset) {
            const double position = (f + offset + 0.5) / phases - 0.5;  // in pixels, from the phase's own
            const int low = static_cast<int>(std::floor(position));
            const float share = static_cast<float>(position - low);
            const auto add = [&](int tap, float part) {
                if (part == 0.0f) return;
                phase_smooth[f][tap] += (offset == 0 ? 2.0f : 1.0f) * part;
                phase_differ[f][tap] += static_cast<float>(offset) * part;
            };
            add(low + 1, 1.0f - share);
            add(low + 2, share);
        }
}

// A region's pixels and how they are sampled.
struct View {
    const float* origin;  // first pixel, values in [0, 1]
    int64_t stride;       // between rows
    const Axis& down;
    const Axis& across;
};

// What the loops leave behind.
struct Scratch {
    alignas(64) float difference[kMaxSources][kSamples];  // source rows, filtered by -1 0 1 along x
    alignas(64) float smoothed[kMaxSources][kSamples];    // by 1 2 1
    alignas(64) uint8_t bins[kSamples * kSamples];        // row by row; columns as in Axis::column
    int counts[kBins];
};

// One rounding to float32, as in the reference: the product is exact in float64.
inline float blend(float lower, float upper, float weight) {
    return static_cast<float>(lower + static_cast<double>(upper - lower) * weight);
}

// The bin of the sample in row i and column j, by the reference's own arithmetic.
inline uint8_t exact_bin(const View& view, int i, int j) {
    double sample[3][3];
    for (int y = 0; y < 3; ++y) {
        const int row = std::min(std::max(i + y - 1, 0), kSamples - 1);
        const float* upper = view.origin + view.down.lower[row] * view.stride;
        const float* lower = view.origin + view.down.upper[row] * view.stride;
        for (int x = 0; x < 3; ++x) {
            const int column = std::min(std::max(j + x - 1, 0), kSamples - 1);
            const int left = view.across.lower[column], right = view.across.upper[column];
            const float weight = view.across.weight[column];
            sample[y][x] = blend(blend(upper[left], upper[right], weight), blend(lower[left], lower[right], weight),
                                 view.down.weight[row]);
        }
    }
    double difference[3], smoothed[3];
    for (int k = 0; k < 3; ++k) difference[k] = sample[k][2] - sample[k][0];
    for (int k = 0; k < 3; k += 2) smoothed[k] = sample[k][0] + 2 * sample[k][1] + sample[k][2];
    const double gradient_x = difference[0] + 2 * difference[1] + difference[2];
    const double gradient_y = smoothed[2] - smoothed[0];
    // volatile: a compiler may otherwise fuse one product with the sum, where the processor can, and round once less.
    volatile const double square_x = gradient_x * gradient_x, square_y = gradient_y * gradient_y;
    const double magnitude = std::sqrt(square_x + square_y);
    int bin = static_cast<int>(magnitude / kBinWidth);
    if (magnitude < bin * kBinWidth) --bin;
    if (magnitude >= (bin + 1) * kBinWidth) ++bin;
    return static_cast<uint8_t>(bin);
}

// counts of kSamples^2 magnitudes -> entropy in bits. Added up in NumPy's order: eight sums side by side in each
// block of 128, then pairs of these.
inline double entropy_of_counts(const int* counts) {
    static const std::vector<double> term = [] {
        std::vector<double> table(kSamples * kSamples + 1);
        for (size_t count = 0; count < table.size(); ++count) table[count] = entropy_term(static_cast<int>(count));
        return table;
    }();
    double total = 0.0;
    for (int block = 0; block < kBins; block += 128) {
        double sums[8] = {};
        for (int i = block; i < block + 128; i += 8)
            for (int k = 0; k < 8; ++k) sums[k] += term[counts[i + k]];
        total += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
    return -total;
}

}  // namespace gpstoken
