// The loops over a region's samples. partition_cpu.cpp includes this once per instruction set, inside a namespace,
// with
//   GPSTOKEN_TARGET        the function attribute that switches the instruction set on (may be empty)
//   GPSTOKEN_FMA(a, b, c)  a * b + c, fused if the instruction set can do that (the compiler itself is told to fuse
//                          nothing in this file, to keep the reference's roundings)
//   GPSTOKEN_VECTOR_BYTES  bytes per vector register, 0 for one that is not known to compare many bytes at a time
// No include guard, therefore. Most loops are plain: compilers turn them into vector code.
//
// The resampling and the Sobel filters are linear and separable, so both run along x on the source rows (few for a
// small region), then along y.

// Source rows -> scratch.difference, scratch.smoothed, for a width of kSize pixels: vectors of whole phases.
template <int kSize>
GPSTOKEN_TARGET inline void filter_rows_by_phase(const View& view, Scratch& scratch) {
    float padded[kMaxSources][kSize + 2];
    const int rows = view.down.sources;
    for (int s = 0; s < rows; ++s) {
        const float* pixels = view.origin + view.down.source[s] * view.stride;
        padded[s][0] = pixels[0];
        std::memcpy(padded[s] + 1, pixels, kSize * sizeof(float));
        padded[s][kSize + 1] = pixels[kSize - 1];
    }
    for (int phase = 0; phase < kSamples / kSize; ++phase) {
        const float* differ = view.across.phase_differ[phase];
        const float* smooth = view.across.phase_smooth[phase];
        const float d0 = differ[0], d1 = differ[1], d2 = differ[2], s0 = smooth[0], s1 = smooth[1], s2 = smooth[2];
        for (int s = 0; s < rows; ++s) {
            const float* p = padded[s];
            float* GPSTOKEN_RESTRICT difference = scratch.difference[s] + phase * kSize;
            float* GPSTOKEN_RESTRICT smoothed = scratch.smoothed[s] + phase * kSize;
            for (int k = 0; k < kSize; ++k) {
                difference[k] = GPSTOKEN_FMA(d0, p[k], GPSTOKEN_FMA(d1, p[k + 1], d2 * p[k + 2]));
                smoothed[k] = GPSTOKEN_FMA(s0, p[k], GPSTOKEN_FMA(s1, p[k + 1], s2 * p[k + 2]));
            }
        }
    }
}

// The same for any width.
GPSTOKEN_TARGET inline void filter_rows(const View& view, Scratch& scratch) {
    const Axis& across = view.across;
    for (int s = 0; s < view.down.sources; ++s) {
        const float* pixels = view.origin + view.down.source[s] * view.stride;
        float low[kSamples], high[kSamples], sample[kSamples + 2];
        for (int j = 0; j < kSamples; ++j) {
            low[j] = pixels[across.lower[j]];
            high[j] = pixels[across.upper[j]];
        }
        for (int j = 0; j < kSamples; ++j) sample[j + 1] = low[j] + (high[j] - low[j]) * across.weight[j];
        sample[0] = sample[1];
        sample[kSamples + 1] = sample[kSamples];
        for (int j = 0; j < kSamples; ++j) {
            scratch.difference[s][j] = sample[j + 2] - sample[j];
            scratch.smoothed[s][j] = sample[j] + 2.0f * sample[j + 1] + sample[j + 2];
        }
    }
}

// scratch.difference, scratch.smoothed -> scratch.bins, where kDoubtful stands for magnitudes too near an edge to
// tell.
template <int kTaps>
GPSTOKEN_TARGET inline void find_bins(const Axis& down, Scratch& scratch) {
    constexpr float kBinsPerUnit = static_cast<float>(1.0 / kBinWidth);
    // How far, in bins, a position computed here may be from the reference's. All values lie in [0, 1], partial sums
    // of a gradient below 4, so a rounding errs by 1.2e-7 at most. Following the worst case through both
    // computations: 3.5e-6 in the magnitude here and 1.4e-6 in the reference for three taps, 5.1e-6 and 1.4e-6 for
    // six, times 46.5 bins.
    constexpr float kError = kTaps == 3 ? 2.5e-4f : 4e-4f;
    // Two Newton steps from the first guess leave 4.8e-6 of the square root; the rest is for the roundings on the
    // way.
    constexpr float kRelativeError = 6e-6f;
    for (int i = 0; i < kSamples; ++i) {
        const float (*difference)[kSamples] = scratch.difference + down.first[i];
        const float (*smoothed)[kSamples] = scratch.smoothed + down.first[i];
        const float* smooth = down.smooth[i];
        const float* differ = down.differ[i];
        int32_t row[kSamples];
        for (int j = 0; j < kSamples; ++j) {
            float gradient_x = 0.0f, gradient_y = 0.0f;
            for (int k = 0; k < kTaps; ++k) {
                gradient_x = GPSTOKEN_FMA(smooth[k], difference[k][j], gradient_x);
                gradient_y = GPSTOKEN_FMA(differ[k], smoothed[k][j], gradient_y);
            }
            // The square root by way of its inverse, since compilers do not vectorise sqrtf while it may set errno.
            // The first guess halves the exponent; zero stays zero.
            const float square = GPSTOKEN_FMA(gradient_x, gradient_x, gradient_y * gradient_y);
            int32_t bits;
            std::memcpy(&bits, &square, sizeof(bits));
            bits = 0x5f3759df - (bits >> 1);
            float inverse;
            std::memcpy(&inverse, &bits, sizeof(inverse));
            inverse *= GPSTOKEN_FMA(-0.5f * square, inverse * inverse, 1.5f);
            const float root = square * inverse;
            const float position = root * GPSTOKEN_FMA(root, inverse * (-0.5f * kBinsPerUnit), 1.5f * kBinsPerUnit);
            const int32_t least = static_cast<int32_t>(GPSTOKEN_FMA(position, 1.0f - kRelativeError, -kError));
            const int32_t most = static_cast<int32_t>(GPSTOKEN_FMA(position, 1.0f + kRelativeError, kError));
            row[j] = least == most ? least : kDoubtful;
        }
        uint8_t* bins = scratch.bins + i * kSamples;
        for (int j = 0; j < kSamples; ++j) bins[j] = static_cast<uint8_t>(row[j]);
    }
}

// Everything but the doubtful ones.
GPSTOKEN_TARGET void gradient_bins(const View& view, Scratch& scratch) {
    // Three taps over a side of two pixels: the third has no weight, but must be a number.
    for (int s = view.down.sources; s < view.down.taps; ++s) {
        std::memset(scratch.difference[s], 0, sizeof(scratch.difference[s]));
        std::memset(scratch.smoothed[s], 0, sizeof(scratch.smoothed[s]));
    }
    switch (view.across.phase_size) {
        case 8:
            filter_rows_by_phase<8>(view, scratch);
            break;
        case 16:
            filter_rows_by_phase<16>(view, scratch);
            break;
        case 32:
            filter_rows_by_phase<32>(view, scratch);
            break;
        case 64:
            filter_rows_by_phase<64>(view, scratch);
            break;
        default:
            filter_rows(view, scratch);
    }
    switch (view.down.taps) {
        case 3:
            find_bins<3>(view.down, scratch);
            break;
        case 4:
            find_bins<4>(view.down, scratch);
            break;
        default:
            find_bins<6>(view.down, scratch);
    }
}

// scratch.bins -> scratch.counts if they span few bins: then comparing all with each bin is faster than the
// increments of a table, above all where neighbours are alike. Else false, and nothing is counted.
GPSTOKEN_TARGET bool count_few_bins(Scratch& scratch) {
#if GPSTOKEN_VECTOR_BYTES == 0
    (void)scratch;
    return false;
#else
    typedef uint8_t Bytes __attribute__((vector_size(GPSTOKEN_VECTOR_BYTES)));
    constexpr int kVectors = kSamples * kSamples / GPSTOKEN_VECTOR_BYTES;
    static_assert(kVectors < 256, "the counts of one lane must fit a byte");
    constexpr int kAtOnce = 8, kFew = 48;
    const Bytes* bins = reinterpret_cast<const Bytes*>(scratch.bins);
    Bytes lowest = bins[0], highest = bins[0];
    for (int i = 1; i < kVectors; ++i) {
        lowest = bins[i] < lowest ? bins[i] : lowest;
        highest = bins[i] > highest ? bins[i] : highest;
    }
    uint8_t lane[GPSTOKEN_VECTOR_BYTES], low = 255, high = 0;
    std::memcpy(lane, &lowest, sizeof(lane));
    for (uint8_t value : lane) low = value < low ? value : low;
    std::memcpy(lane, &highest, sizeof(lane));
    for (uint8_t value : lane) high = value > high ? value : high;
    if (high - low >= kFew) return false;

    std::fill(scratch.counts, scratch.counts + kBins, 0);
    for (int from = low; from <= high; from += kAtOnce) {
        Bytes bin[kAtOnce], count[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) {
            count[k] = Bytes{};
            bin[k] = count[k] + static_cast<uint8_t>(from + k);
        }
        for (int i = 0; i < kVectors; ++i)
            for (int k = 0; k < kAtOnce; ++k)
                // The same thing said as the two instruction sets do it: with a mask register, or with -1 for true.
                if (GPSTOKEN_VECTOR_BYTES == 64)
                    count[k] = bins[i] == bin[k] ? count[k] + 1 : count[k];
                else
                    count[k] -= reinterpret_cast<Bytes>(bins[i] == bin[k]);
        for (int k = 0; k < kAtOnce; ++k) {
            std::memcpy(lane, &count[k], sizeof(lane));
            scratch.counts[from + k] = std::accumulate(lane, lane + sizeof(lane), 0);
        }
    }
    return true;
#endif
}
