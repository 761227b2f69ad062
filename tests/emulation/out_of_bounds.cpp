// Runs both splatting kernels on buffers of exactly the size that they may touch. Compiled with
// -fsanitize=address,undefined,float-cast-overflow, it ends with an error at the first access outside of one.
//
//   out_of_bounds            every case; prints how many launches went well
//   out_of_bounds forward    gives the map one element too few: must be caught
//   out_of_bounds backward   gives the texture gradient one element too few: must be caught

#include <stdio.h>

#include <cmath>

#include "splat_cuda.cu"

namespace {

struct Case {
    int64_t B, N, C, H, W;
};

// Awkward sizes: one of each, primes, one more than a tile, a slice, a round of culling; and eight tokens to a block.
// The element types take turns.
const Case kCases[] = {{1, 0, 3, 4, 5},    {1, 1, 1, 1, 1},  {2, 17, 3, 7, 5},   {1, 130, 33, 17, 33},
                       {1, 5, 130, 2, 1},  {3, 9, 16, 1, 9}, {4, 257, 32, 3, 2}, {128, 1, 33, 17, 3},
                       {2, 33, 8, 33, 17}, {1, 17, 5, 48, 1}};

std::mt19937 source(1);

float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(source()) / static_cast<float>(std::mt19937::max());
}

// Mostly sensible tokens, many far outside the image; every fifth with a number that is none or makes no sense.
std::vector<float> geometry_of(const Case& c) {
    const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.5f, 1.0f, 3e38f, 1e-39f, 2e-38f};
    std::vector<float> geometry;
    for (int64_t i = 0; i < c.B * c.N; ++i) {
        const float token[] = {uniform(0.001f, 1.5f), uniform(0.001f, 1.5f), uniform(-1.0f, 1.0f), uniform(-3.0f, 3.0f),
                               uniform(-3.0f, 3.0f)};
        geometry.insert(geometry.end(), token, token + 5);
        if (i % 5 == 0) geometry[static_cast<size_t>(i * 5 + source() % 5)] = odd[source() % 9];
    }
    return geometry;
}

// On the heap, and of the exact size, so that the sanitiser's guards lie right beside it.
template <class T>
std::unique_ptr<T[]> buffer(int64_t size) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]());
}

template <class T>
int run(const Case& c, int dtype, float support, int64_t short_forward, int64_t short_backward) {
    const std::vector<float> values = geometry_of(c);
    const auto geometry = buffer<float>(c.B * c.N * 5);
    std::copy(values.begin(), values.end(), geometry.get());
    const auto texture = buffer<T>(c.B * c.N * c.C), map = buffer<T>(c.B * c.C * c.H * c.W - short_forward);
    const auto grad_out = buffer<T>(c.B * c.C * c.H * c.W);
    const auto grad_geometry = buffer<float>(c.B * c.N * 5);
    const auto grad_texture = buffer<T>(c.B * c.N * c.C - short_backward);
    const int forward = gpstoken_splat_forward_cuda(geometry.get(), texture.get(), map.get(), c.B, c.N, c.C, c.H, c.W,
                                                    support, dtype, nullptr);
    const int backward =
        gpstoken_splat_backward_cuda(geometry.get(), texture.get(), grad_out.get(), grad_geometry.get(),
                                     grad_texture.get(), c.B, c.N, c.C, c.H, c.W, support, dtype, nullptr);
    if (forward == GPSTOKEN_OK && backward == GPSTOKEN_OK) return 2;
    printf("a launch failed: %s\n", emulation::machine.error.c_str());
    exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string broken = count > 1 ? arguments[1] : "";
    if (!broken.empty()) return run<float>({1, 3, 3, 4, 5}, 0, 3.0f, broken == "forward", broken == "backward") - 2;
    int launches = 0;
    for (const Case& c : kCases) {
        const int dtype = static_cast<int>(&c - kCases) % 3;
        launches += dtype == GPSTOKEN_FLOAT32 ? run<float>(c, dtype, 3.0f, 0, 0) : run<uint16_t>(c, dtype, 5.0f, 0, 0);
    }
    printf("%d launches\n", launches);
    return 0;
}
