// Host side of the CUDA partition: checks, levels, scratch memory, launches. The C interface is described in
// gpstoken_native.h.

#include <algorithm>
#include <map>
#include <tuple>

#include "cuda_launch.h"
#include "gpstoken_native.h"
#include "partition_arguments.h"
#if !defined(GPSTOKEN_NVRTC)
#include "partition_bias.cuh"
#include "partition_list.cuh"
#endif

namespace {

using namespace gpstoken;
using namespace gpstoken::cuda;

constexpr int64_t kLargestSide = 1 << 24;
constexpr int64_t kMostTokens = 1 << 28;

// Regions that are measured beforehand, in a whole batch, for each token of an image. One that is not is measured when
// it is needed, by one multiprocessor per image: three for each token, one after the other. So with 128 multiprocessors
// this much takes a third of the time that it may save, and on a small GPU as long. Results do not depend on it.
#if !defined(GPSTOKEN_BEFOREHAND)
#define GPSTOKEN_BEFOREHAND 128
#endif

struct Candidates {
    Levels levels;   // those to measure beforehand
    int64_t leaves;  // regions that cannot be cut further, whatever the picture
};

// What can come of an image of some size. Regions of the same size are cut alike, and at each level there are few
// sizes.
Candidates find_candidates(int64_t height, int64_t width, int min_region_size, int64_t affordable) {
    using Shape = std::tuple<int, int, int>;  // cuts along x, width, height
    // How many regions of a shape one partition into leaves has, that which cuts squares along x. 0: another has some.
    std::map<Shape, int64_t> shapes = {{{0, static_cast<int>(width), static_cast<int>(height)}, 1}};
    Candidates found = {};
    bool open = true;  // levels are still added
    for (int level = 0; !shapes.empty(); ++level) {
        const int fewest = std::get<0>(shapes.begin()->first), most = std::get<0>(shapes.rbegin()->first);
        open = open && level < kMostLevels;
        if (open) {
            const int64_t end = found.levels.start[level] + (static_cast<int64_t>(most - fewest + 1) << level);
            open = end <= affordable;
            if (open) {
                found.levels.count = level + 1;
                found.levels.fewest_cuts_x[level] = fewest;
                found.levels.start[level + 1] = static_cast<int>(end);
            }
        }
        std::map<Shape, int64_t> next;
        for (const auto& [shape, count] : shapes) {
            const auto [cuts_x, w, h] = shape;
            if (!splittable({0, 0, w - 1, h - 1}, min_region_size)) {
                found.leaves += count;
                continue;
            }
            if (w >= h) {
                next[{cuts_x + 1, w / 2, h}] += count;
                next[{cuts_x + 1, w - w / 2, h}] += count;
            }
            if (h >= w) {
                next[{cuts_x, w, h / 2}] += h > w ? count : 0;
                next[{cuts_x, w, h - h / 2}] += h > w ? count : 0;
            }
        }
        shapes = std::move(next);
    }
    return found;
}

// Sizes, and where the parts of the scratch memory start, in bytes.
struct Plan {
    Levels levels;
    int64_t list_size, entries_size;  // per image
    int64_t table, list, entries, bias_sums, bytes;
};

int make_plan(int64_t B, int64_t H, int64_t W, int64_t N, int min_region_size, bool biased, Plan* plan) {
    // As on the CPU: a minimum below 2 would allow regions one pixel wide, whose Gaussians have no width.
    if (B < 0 || B > kLargestGrid || H < 2 || W < 2 || H > kLargestSide || W > kLargestSide || N < 1 ||
        min_region_size < 2)
        return GPSTOKEN_INVALID_ARGUMENT;
    // The table of the whole batch has a block per region; 2^28 of these would be slower than none.
    const int64_t affordable = std::min(int64_t{GPSTOKEN_BEFOREHAND} * N, int64_t{1} << 28) / std::max<int64_t>(B, 1);
    const Candidates candidates = find_candidates(H, W, min_region_size, affordable);
    if (N > candidates.leaves) return GPSTOKEN_TOO_MANY_TOKENS;
    if (N > kMostTokens) return GPSTOKEN_INVALID_ARGUMENT;
    *plan = {};
    plan->levels = candidates.levels;
    plan->list_size = 2 * N - 1;
    plan->entries_size = 1;
    while (plan->entries_size < plan->list_size) plan->entries_size *= 2;
    const auto part = [plan](int64_t bytes) {
        const int64_t start = plan->bytes;
        plan->bytes += ceil_div(bytes, 256) * 256;
        return start;
    };
    plan->table = part(B * plan->levels.start[plan->levels.count] * static_cast<int64_t>(sizeof(double)));
    plan->list = part(B * plan->list_size * static_cast<int64_t>(sizeof(ListedRegion)));
    plan->entries = part(B * plan->entries_size * static_cast<int64_t>(sizeof(Entry)));
    plan->bias_sums = part(biased ? B * H * W * static_cast<int64_t>(sizeof(double)) : 0);
    return GPSTOKEN_OK;
}

int sum_bias(const float* bias, double* sums, int64_t B, int64_t H, int64_t W, cudaStream_t stream) {
    BiasSums args = {bias, sums, static_cast<int>(H), static_cast<int>(W), B * H};
    const int code = launch(bias_rows_kernel, ceil_div(args.lines, kBiasThreads), kBiasThreads, stream, args);
    if (code != GPSTOKEN_OK) return code;
    args.lines = B * W;
    return launch(bias_columns_kernel, ceil_div(args.lines, kBiasThreads), kBiasThreads, stream, args);
}

}  // namespace

extern "C" {

int gpstoken_partition_terms_cuda(double* terms) {
    for (int count = 0; count <= kSamples * kSamples; ++count) terms[count] = entropy_term(count);
    return GPSTOKEN_OK;
}

int gpstoken_partition_scratch_cuda(int64_t B, int64_t H, int64_t W, int64_t N, int min_region_size, int biased,
                                    int64_t* bytes) {
    Plan plan;
    const int code = make_plan(B, H, W, N, min_region_size, biased != 0, &plan);
    if (code == GPSTOKEN_OK) *bytes = plan.bytes;
    return code;
}

int gpstoken_partition_cuda(const float* grey, const float* bias, const double* terms, void* scratch, int32_t* regions,
                            double* complexity, int64_t B, int64_t H, int64_t W, int64_t N, int min_region_size,
                            double entropy_exponent, void* stream) {
    Plan plan;
    int code = make_plan(B, H, W, N, min_region_size, bias != nullptr, &plan);
    if (code != GPSTOKEN_OK || B == 0) return code;
    const auto queue = static_cast<cudaStream_t>(stream);
    char* const memory = static_cast<char*>(scratch);

    Picture picture = {grey, nullptr, terms, static_cast<int>(H), static_cast<int>(W), entropy_exponent};
    if (bias != nullptr) {
        double* const sums = reinterpret_cast<double*>(memory + plan.bias_sums);
        code = sum_bias(bias, sums, B, H, W, queue);
        if (code != GPSTOKEN_OK) return code;
        picture.bias_sums = sums;
    }

    double* const table = reinterpret_cast<double*>(memory + plan.table);
    if (plan.levels.count > 0) {
        const PartitionLevels args = {picture, plan.levels, min_region_size, table};
        const int64_t blocks = B * plan.levels.start[plan.levels.count];
        code = launch(partition_levels_kernel, blocks, kLevelThreads, queue, args);
        if (code != GPSTOKEN_OK) return code;
    }

    PartitionList args = {};
    args.picture = picture;
    args.levels = plan.levels;
    args.table = table;
    args.list = reinterpret_cast<ListedRegion*>(memory + plan.list);
    args.entries = reinterpret_cast<Entry*>(memory + plan.entries);
    args.regions = regions;
    args.complexity = complexity;
    args.tokens = static_cast<int>(N);
    args.min_region_size = min_region_size;
    args.list_size = static_cast<int>(plan.list_size);
    args.entries_size = static_cast<int>(plan.entries_size);
    return launch(partition_list_kernel, B, kListThreads, queue, args);
}

}  // extern "C"
