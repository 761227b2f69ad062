// Runs the CUDA partition on buffers of exactly the size that it may touch. Compiled with
// -fsanitize=address,undefined,float-cast-overflow, it ends with an error at the first access outside of one.
//
//   partition_out_of_bounds            every case; prints how many calls went well
//   partition_out_of_bounds regions    gives the regions one number too few: must be caught
//   partition_out_of_bounds scratch    gives too little scratch memory: must be caught

#include <stdio.h>

#include <cmath>

#include "emulated_partition.cpp"

namespace {

struct Case {
    int64_t B, N, H, W;
    int min_region_size;
    bool biased;
};

// The smallest, awkward ones, all tokens that there can be; squares and strips.
const Case kCases[] = {{1, 1, 2, 2, 2, true},  {2, 7, 13, 17, 2, false}, {1, 16, 32, 32, 8, true},
                       {3, 2, 9, 70, 5, true}, {1, 25, 3, 100, 3, true}, {1, 12, 33, 33, 8, false}};

template <class T>
std::unique_ptr<T[]> buffer(int64_t size) {  // on the heap and of the exact size
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]());
}

int run(const Case& c, int64_t short_regions, double share_of_scratch) {
    std::mt19937 source(1);
    const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f};
    const auto grey = buffer<float>(c.B * c.H * c.W), bias = buffer<float>(c.B * c.H * c.W);
    for (int64_t i = 0; i < c.B * c.H * c.W; ++i) {
        grey[i] = static_cast<float>(source() % 513) / 256.0f - 1.0f;
        bias[i] = static_cast<float>(source() % 513) - 256.0f;
        if (i % 97 == 5) grey[i] = odd[source() % 4];
        if (i % 97 == 6) bias[i] = odd[source() % 4];
    }
    const auto terms = buffer<double>(kSamples * kSamples + 1);
    gpstoken_partition_terms_cuda(terms.get());
    int64_t bytes = 0;
    int code = gpstoken_partition_scratch_cuda(c.B, c.H, c.W, c.N, c.min_region_size, c.biased, &bytes);
    // Parts lie at multiples of 256 bytes, so nothing guards the gaps between them.
    const auto scratch = buffer<char>(static_cast<int64_t>(static_cast<double>(bytes) * share_of_scratch));
    const auto regions = buffer<int32_t>(c.B * c.N * 4 - short_regions);
    const auto complexity = buffer<double>(c.B * c.N);
    if (code == GPSTOKEN_OK)
        code = gpstoken_partition_cuda(grey.get(), c.biased ? bias.get() : nullptr, terms.get(), scratch.get(),
                                       regions.get(), complexity.get(), c.B, c.H, c.W, c.N, c.min_region_size, 2.5,
                                       nullptr);
    if (code == GPSTOKEN_OK) return 1;
    printf("a call failed with code %d: %s\n", code, emulation::machine.error.c_str());
    exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string broken = count > 1 ? arguments[1] : "";
    if (!broken.empty()) return run(kCases[1], broken == "regions", broken == "scratch" ? 0.5 : 1.0) - 1;
    int calls = 0;
    for (const int64_t regions_per_token : {0, 2, 128}) {
        emulation_set_beforehand(regions_per_token);
        for (const Case& c : kCases) calls += run(c, 0, 1.0);
    }
    printf("%d calls\n", calls);
    return 0;
}
