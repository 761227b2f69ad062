// The way of working of the research code's CUDA extension, written anew, to compare with in benchmark_splat.py:
// one image per call; blocks of 16 threads; forward with a thread per pixel that visits every token and adds to its
// pixel in global memory, channels last, and 16 times the threads that this takes; backward with one thread per token
// that visits every pixel and adds to its gradients in global memory. And an empty kernel, for the price of a launch.

#include <cuda_runtime.h>

namespace {

struct Image {
    const float* geometry;  // (tokens, 5)
    const float* texture;   // (tokens, channels)
    int tokens, channels, height, width;
    float support;
};

// Offsets of a pixel from a token, in sigmas; false outside the token's box.
__device__ bool offsets(const Image& image, const float* token, int row, int column, float* u, float* v) {
    const float dx = 2.0f * column / (image.width - 1) - 1.0f - token[3];
    const float dy = 2.0f * row / (image.height - 1) - 1.0f - token[4];
    *u = dx / token[0];
    *v = dy / token[1];
    return fabsf(dx) <= image.support * token[0] && fabsf(dy) <= image.support * token[1];
}

__global__ void forward(const Image image, float* out) {
    const long long pixel = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pixel >= static_cast<long long>(image.height) * image.width) return;
    const int row = static_cast<int>(pixel / image.width), column = static_cast<int>(pixel % image.width);
    for (int i = 0; i < image.tokens; ++i) {
        const float* token = image.geometry + i * 5;
        float u, v;
        if (!offsets(image, token, row, column, &u, &v)) continue;
        const float rho = token[2];
        const float weight = expf(-(u * u - 2.0f * rho * u * v + v * v) / (2.0f * (1.0f - rho * rho)));
        for (int c = 0; c < image.channels; ++c)
            out[pixel * image.channels + c] += weight * image.texture[i * image.channels + c];
    }
}

__global__ void backward(const Image image, const float* grad_out, float* grad_geometry, float* grad_texture) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= image.tokens) return;
    const float* token = image.geometry + i * 5;
    const float rho = token[2], inverse = 1.0f / (1.0f - rho * rho);
    for (int row = 0; row < image.height; ++row) {
        for (int column = 0; column < image.width; ++column) {
            float u, v;
            if (!offsets(image, token, row, column, &u, &v)) continue;
            const float weight = expf(-0.5f * inverse * (u * u - 2.0f * rho * u * v + v * v));
            const float a = inverse * (u - rho * v), b = inverse * (v - rho * u);  // -d log(weight) / du, dv
            const float slope[5] = {weight * a * u / token[0], weight * b * v / token[1], weight * a * b,
                                    weight * a / token[0], weight * b / token[1]};
            for (int c = 0; c < image.channels; ++c) {
                const float upstream =
                    grad_out[(static_cast<long long>(row) * image.width + column) * image.channels + c];
                grad_texture[i * image.channels + c] += weight * upstream;
                const float product = upstream * image.texture[i * image.channels + c];
                for (int j = 0; j < 5; ++j) grad_geometry[i * 5 + j] += product * slope[j];
            }
        }
    }
}

__global__ void nothing() {}

}  // namespace

extern "C" {

// One image; out (height, width, channels) starts as zeros.
int official_forward(const float* geometry, const float* texture, float* out, int tokens, int channels, int height,
                     int width, float support, void* stream) {
    const Image image = {geometry, texture, tokens, channels, height, width, support};
    forward<<<height * width, 16, 0, static_cast<cudaStream_t>(stream)>>>(image, out);
    return static_cast<int>(cudaGetLastError());
}

// One image; grad_out (height, width, channels); both gradients start as zeros.
int official_backward(const float* geometry, const float* texture, const float* grad_out, float* grad_geometry,
                      float* grad_texture, int tokens, int channels, int height, int width, float support,
                      void* stream) {
    const Image image = {geometry, texture, tokens, channels, height, width, support};
    backward<<<tokens, 16, 0, static_cast<cudaStream_t>(stream)>>>(image, grad_out, grad_geometry, grad_texture);
    return static_cast<int>(cudaGetLastError());
}

int launch_nothing(void* stream) {
    nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
    return static_cast<int>(cudaGetLastError());
}

}  // extern "C"
