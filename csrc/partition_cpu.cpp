// gpstoken_partition_cpu: entropy-driven partition of grey images into regions, an image per thread.
//
// The reference is gpstoken_diffusers/ops/partition_reference.py; regions and order are the same, bit for bit.
// partition_shared.h has the rules, partition.h and partition_cpu_kernel.h measure one region; here is the list of
// regions and how it grows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "cpu_isa.h"
#include "gpstoken_native.h"
#include "parallel.h"
#include "partition.h"

namespace gpstoken {
namespace {

// ---- one copy of the loops per instruction set ----

#if defined(_MSC_VER)
#define GPSTOKEN_RESTRICT __restrict
#else
#define GPSTOKEN_RESTRICT __restrict__
#endif

#if defined(GPSTOKEN_X86_DISPATCH)
namespace avx512 {
#define GPSTOKEN_FMA(a, b, c) __builtin_fmaf(a, b, c)
#define GPSTOKEN_VECTOR_BYTES 64
#define GPSTOKEN_TARGET GPSTOKEN_TARGET_AVX512
#include "partition_cpu_kernel.h"
#undef GPSTOKEN_FMA
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_BYTES
}  // namespace avx512
namespace avx2 {
#define GPSTOKEN_FMA(a, b, c) __builtin_fmaf(a, b, c)
#define GPSTOKEN_VECTOR_BYTES 32
#define GPSTOKEN_TARGET GPSTOKEN_TARGET_AVX2
#include "partition_cpu_kernel.h"
#undef GPSTOKEN_FMA
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_BYTES
}  // namespace avx2
#endif
namespace baseline {
#if defined(__FP_FAST_FMAF)
#define GPSTOKEN_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define GPSTOKEN_FMA(a, b, c) ((a) * (b) + (c))
#endif
#define GPSTOKEN_VECTOR_BYTES 0
#define GPSTOKEN_TARGET
#include "partition_cpu_kernel.h"
#undef GPSTOKEN_FMA
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_BYTES
}  // namespace baseline

struct Kernels {
    decltype(&baseline::gradient_bins) gradient_bins;
    decltype(&baseline::count_few_bins) count_few_bins;
};

// The instruction set that the whole library has settled on.
Kernels choose_kernels() {
#if defined(GPSTOKEN_X86_DISPATCH)
    if (best_isa() == Isa::kAvx512) return {avx512::gradient_bins, avx512::count_few_bins};
    if (best_isa() == Isa::kAvx2) return {avx2::gradient_bins, avx2::count_few_bins};
#endif
    return {baseline::gradient_bins, baseline::count_few_bins};
}

// ---- one region ----

// Entropy of the gradients of regions of one size of image.
class GradientEntropy {
   public:
    explicit GradientEntropy(int64_t stride) : stride_(stride), kernels_(choose_kernels()), scratch_(new Scratch) {}

    double operator()(const float* image, const Box& box) {
        const Axis& down = axis(box.y1 - box.y0 + 1);
        const Axis& across = axis(box.x1 - box.x0 + 1);
        const View view{image + box.y0 * stride_ + box.x0, stride_, down, across};
        Scratch& scratch = *scratch_;
        kernels_.gradient_bins(view, scratch);
        uint8_t* const end = scratch.bins + sizeof(scratch.bins);
        for (uint8_t* bin = scratch.bins; (bin = find_doubtful(bin, end)) != nullptr; ++bin) {
            const int64_t at = bin - scratch.bins;
            *bin = exact_bin(view, static_cast<int>(at / kSamples), across.column[at % kSamples]);
        }
        if (!kernels_.count_few_bins(scratch)) count(scratch);
        return entropy_of_counts(scratch.counts);
    }

   private:
    static uint8_t* find_doubtful(uint8_t* from, uint8_t* end) {
        return static_cast<uint8_t*>(std::memchr(from, kDoubtful, static_cast<size_t>(end - from)));
    }

    // Four tables, since an increment must wait for the last one of the same entry.
    static void count(Scratch& scratch) {
        uint16_t tables[4][kBins] = {};
        for (int i = 0; i < kSamples * kSamples; i += 4)
            for (int k = 0; k < 4; ++k) ++tables[k][scratch.bins[i + k]];
        for (int b = 0; b < kBins; ++b) scratch.counts[b] = tables[0][b] + tables[1][b] + tables[2][b] + tables[3][b];
    }

    const Axis& axis(int size) {
        if (axes_.size() <= static_cast<size_t>(size)) axes_.resize(static_cast<size_t>(size) + 1);
        if (!axes_[size]) axes_[size] = std::make_unique<Axis>(size);
        return *axes_[size];
    }

    int64_t stride_;
    Kernels kernels_;
    std::unique_ptr<Scratch> scratch_;
    std::vector<std::unique_ptr<Axis>> axes_;  // by size, made when first needed
};

// Of this process so far; see gpstoken_partition_evaluations_cpu.
std::atomic<int64_t> evaluations_so_far{0};

// ---- the list of regions ----

struct Region {
    Box box;
    double complexity;
};

// A region that can be split.
struct Candidate {
    double complexity;
    int64_t index;
    bool operator<(const Candidate& other) const {
        return comes_first(other.complexity, other.index, complexity, index);
    }
};

struct Settings {
    int64_t height, width, num_tokens;
    int min_region_size;
    double entropy_exponent;
};

class Partitioner {
   public:
    explicit Partitioner(const Settings& settings)
        : settings_(settings), unit_(settings.height * settings.width), entropy_(settings.width) {}

    // False if there are fewer leaves than tokens.
    bool run(const float* grey, const float* bias, int32_t* out) {
        prepare(grey, bias);
        const bool enough = divide();
        evaluations_so_far.fetch_add(std::exchange(evaluations_, 0), std::memory_order_relaxed);
        if (enough) write(out);
        return enough;
    }

   private:
    using Pair = std::pair<Region, Region>;

    bool divide() {
        regions_.clear();
        std::priority_queue<Candidate> candidates;
        const auto add = [&](const Region& region) {
            if (splittable(region.box, settings_.min_region_size))
                candidates.push({region.complexity, static_cast<int64_t>(regions_.size())});
            regions_.push_back(region);
        };
        add(measure({0, 0, static_cast<int>(settings_.width) - 1, static_cast<int>(settings_.height) - 1}));
        alive_.assign(1, true);
        for (int64_t count = 1; count < settings_.num_tokens; ++count) {
            if (candidates.empty()) return false;
            const int64_t chosen = candidates.top().index;
            candidates.pop();
            alive_[chosen] = false;
            const auto [first, second] = split(regions_[chosen].box);
            add(first);
            add(second);
            alive_.insert(alive_.end(), 2, true);
        }
        return true;
    }

    void prepare(const float* grey, const float* bias) {
        for (size_t i = 0; i < unit_.size(); ++i) unit_[i] = (grey[i] + 1.0f) * 0.5f;
        table_.clear();
        if (bias == nullptr) return;
        // Sums above and left of each pixel corner, added along rows first as in the reference.
        const int64_t stride = settings_.width + 1;
        table_.assign(stride * (settings_.height + 1), 0.0);
        for (int64_t y = 0; y < settings_.height; ++y) {
            double row = 0.0;
            for (int64_t x = 0; x < settings_.width; ++x) {
                row += bias[y * settings_.width + x];
                table_[(y + 1) * stride + x + 1] = table_[y * stride + x + 1] + row;
            }
        }
    }

    Region measure(const Box& box) {
        ++evaluations_;
        const double entropy = entropy_(unit_.data(), box);
        double complexity =
            region_complexity(entropy, settings_.entropy_exponent, box.y1 - box.y0 + 1, box.x1 - box.x0 + 1);
        if (!table_.empty()) {
            const double* above = &table_[box.y0 * (settings_.width + 1)];
            const double* below = &table_[(box.y1 + 1) * (settings_.width + 1)];
            complexity += below[box.x1 + 1] - above[box.x1 + 1] - below[box.x0] + above[box.x0];
        }
        return {box, complexity};
    }

    Pair halves(const Box& box, bool along_x) {
        return {measure(half_of(box, along_x, false)), measure(half_of(box, along_x, true))};
    }

    Pair split(const Box& box) {
        const int extent_x = box.x1 - box.x0, extent_y = box.y1 - box.y0;
        if (extent_x != extent_y) return halves(box, extent_x > extent_y);
        const Pair in_x = halves(box, true), in_y = halves(box, false);
        return square_is_cut_along_x(in_x.first.complexity, in_x.second.complexity, in_y.first.complexity,
                                     in_y.second.complexity)
                   ? in_x
                   : in_y;
    }

    // The list as the reference leaves it: sorted before the last split, whose halves come at the end.
    void write(int32_t* out) {
        order_.clear();
        const size_t sorted = regions_.size() > 1 ? regions_.size() - 2 : 0;
        for (size_t i = 0; i < sorted; ++i)
            if (alive_[i]) order_.push_back({regions_[i].complexity, static_cast<int64_t>(i)});
        std::sort(order_.begin(), order_.end(), [](const Candidate& a, const Candidate& b) { return b < a; });
        for (size_t i = sorted; i < regions_.size(); ++i) order_.push_back({0.0, static_cast<int64_t>(i)});
        for (const Candidate& entry : order_) {
            const Box& box = regions_[entry.index].box;
            *out++ = box.x0;
            *out++ = box.y0;
            *out++ = box.x1;
            *out++ = box.y1;
        }
    }

    Settings settings_;
    std::vector<float> unit_;      // grey values in [0, 1]
    std::vector<double> table_;    // summed-area table of the bias; empty: no bias
    std::vector<Region> regions_;  // all ever made, in that order
    std::vector<bool> alive_;      // those not yet split
    int64_t evaluations_ = 0;      // regions measured, of the image at hand
    std::vector<Candidate> order_;
    GradientEntropy entropy_;
};

}  // namespace
}  // namespace gpstoken

extern "C" int gpstoken_partition_cpu(const float* grey, const float* bias, int32_t* regions, int64_t B, int64_t H,
                                      int64_t W, int64_t N, int min_region_size, double entropy_exponent,
                                      int num_threads) {
    using namespace gpstoken;
    // Coordinates are int32; a minimum below 2 would allow regions one pixel wide, whose Gaussians have no width.
    if (B < 0 || H < 2 || W < 2 || H > (1 << 24) || W > (1 << 24) || N < 1 || min_region_size < 2)
        return GPSTOKEN_INVALID_ARGUMENT;
    const Settings settings{H, W, N, min_region_size, entropy_exponent};
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(num_threads, B));
    std::atomic<int> result{GPSTOKEN_OK};
    std::atomic<int64_t> next{0};
    parallel_for(workers, static_cast<int>(workers), [&](int64_t, int) {
        try {
            Partitioner partitioner(settings);
            for (int64_t i = next++; i < B && result == GPSTOKEN_OK; i = next++)
                if (!partitioner.run(grey + i * H * W, bias ? bias + i * H * W : nullptr, regions + i * N * 4))
                    result = GPSTOKEN_TOO_MANY_TOKENS;
        } catch (const std::bad_alloc&) {
            result = GPSTOKEN_OUT_OF_MEMORY;
        }
    });
    return result;
}

extern "C" int64_t gpstoken_partition_evaluations_cpu(void) {
    return gpstoken::evaluations_so_far.load(std::memory_order_relaxed);
}
