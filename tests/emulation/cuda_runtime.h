// A stand-in for CUDA's header of the same name: csrc/*_cuda.cu, compiled as plain C++17, launch their kernels on this
// machine's processor. One OS thread; every CUDA thread of a block is a fiber that runs until it meets a barrier
// or a warp operation; which warp goes on, and in which order its lanes, a seed decides.
//
// What it checks that a GPU would not: all threads of a block meet the same __syncthreads, all lanes of a warp the
// same warp operation (else the launch fails and says where); shared memory starts as NaNs in every block; a result
// that depends on the order of threads or blocks shows as a difference between seeds. Built with
// -fsanitize=address,undefined, it also finds accesses outside any buffer, shared memory included.
// What it cannot check: speed, memory ordering finer than barriers, the compiler for the GPU.
#pragma once

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "half_types.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GPSTOKEN_SHARED(Type, name) Type& name = *static_cast<Type*>(emulation::shared_memory(sizeof(Type)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;  // of the fiber that runs

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };
enum class Operation { kNone, kBlockBarrier, kWarpBarrier, kBallot, kShuffle };

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started;
    State state;
    Operation operation;
    int line;          // of the source, where it waits
    unsigned payload;  // what it brings to a warp operation; after it, what it gets
    unsigned partner;  // lane mask of a shuffle
    std::unique_ptr<char[]> stack;
};

struct Machine {
    unsigned seed = 0;
    std::string error;
    std::vector<Fiber> fibers;
    size_t current = 0;
    ucontext_t scheduler;
    jmp_buf scheduler_resume;
    std::unique_ptr<char[]> shared;  // exactly as large as the kernel asks, so that an address sanitiser guards it
    void (*entry)(void*) = nullptr;
    void* argument = nullptr;
};

inline Machine machine;

// Switching without the system call that swapcontext makes for signal masks; sanitisers know only the latter. Never
// inlined: such functions return twice.
#if defined(__SANITIZE_ADDRESS__)
[[gnu::noinline]] inline void leave_fiber(Fiber& fiber) { swapcontext(&fiber.start, &machine.scheduler); }
[[gnu::noinline]] inline void enter_fiber(Fiber& fiber) { swapcontext(&machine.scheduler, &fiber.start); }
#else
[[gnu::noinline]] inline void leave_fiber(Fiber& fiber) {
    if (!_setjmp(fiber.resume)) _longjmp(machine.scheduler_resume, 1);
}
[[gnu::noinline]] inline void enter_fiber(Fiber& fiber) {
    if (_setjmp(machine.scheduler_resume)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}
#endif

inline void fiber_main() {
    machine.entry(machine.argument);
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = State::kDone;
    leave_fiber(fiber);
}

[[gnu::noinline]] inline void rewind_fiber(Fiber& fiber) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
}

// The fiber that runs stops here until the scheduler has served the operation; the result is its payload.
inline unsigned wait(Operation operation, int line, unsigned payload, unsigned partner) {
    const size_t self = machine.current;
    Fiber& fiber = machine.fibers[self];
    fiber.state = operation == Operation::kBlockBarrier ? State::kAtBlockBarrier : State::kAtWarpOperation;
    fiber.operation = operation;
    fiber.line = line;
    fiber.payload = payload;
    fiber.partner = partner;
    leave_fiber(fiber);
    return machine.fibers[self].payload;
}

inline void* shared_memory(size_t bytes) {
    if (!machine.shared) {
        machine.shared.reset(new char[bytes]);
        memset(machine.shared.get(), 0xff, bytes);  // a NaN in every float
        if (bytes > kSharedLimit) machine.error = "more than 48 KiB of shared memory";
    }
    return machine.shared.get();
}

inline std::string position(size_t thread) {
    const Fiber& fiber = machine.fibers[thread];
    const std::string name = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
    return fiber.state == State::kDone ? name + " has returned" : name + " waits at line " + std::to_string(fiber.line);
}

// Serves the operation that all lanes of a warp have reached, if it is the same one.
inline bool serve_warp(size_t first) {
    std::vector<Fiber>& fibers = machine.fibers;
    const size_t end = std::min(first + kWarp, fibers.size());
    unsigned gathered[kWarp] = {}, ballot = 0;
    for (size_t i = first; i < end; ++i) {
        if (fibers[i].state != State::kAtWarpOperation) return false;
        if (fibers[i].operation != fibers[first].operation || fibers[i].line != fibers[first].line ||
            fibers[i].partner != fibers[first].partner) {
            machine.error = "lanes diverge: " + position(first) + ", " + position(i);
            return false;
        }
        gathered[i - first] = fibers[i].payload;
        if (fibers[i].payload) ballot |= 1u << (i - first);
    }
    for (size_t i = first; i < end; ++i) {
        if (fibers[i].operation == Operation::kBallot) fibers[i].payload = ballot;
        if (fibers[i].operation == Operation::kShuffle) fibers[i].payload = gathered[(i - first) ^ fibers[i].partner];
        fibers[i].state = State::kReady;
    }
    return true;
}

// Runs the lanes of a warp that can go on, in random order; false if none could.
inline bool step_warp(size_t first, std::mt19937& order_source) {
    size_t lanes[kWarp];
    const size_t count = std::min(size_t{kWarp}, machine.fibers.size() - first);
    std::iota(lanes, lanes + count, first);
    std::shuffle(lanes, lanes + count, order_source);
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
        if (machine.fibers[lanes[i]].state != State::kReady) continue;
        moved = true;
        machine.current = lanes[i];
        threadIdx = dim3(static_cast<unsigned>(lanes[i]), 0, 0);
        enter_fiber(machine.fibers[lanes[i]]);
    }
    return serve_warp(first) || moved;
}

inline bool serve_block() {
    for (const Fiber& fiber : machine.fibers)
        if (fiber.state != State::kAtBlockBarrier || fiber.line != machine.fibers[0].line) return false;
    for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
    return true;
}

// Runs all threads of one block to the end; false, with machine.error set, if they cannot get there.
inline bool run_block(unsigned block, std::mt19937& order_source) {
    std::vector<Fiber>& fibers = machine.fibers;
    blockIdx = dim3(block, 0, 0);
    machine.shared.reset();
    for (Fiber& fiber : fibers) {
        fiber.started = false;
        fiber.state = State::kReady;
        rewind_fiber(fiber);
    }
    // A random warp goes as far as a coin and its barriers let it, then another: warps drift apart as on a GPU.
    std::vector<size_t> warps((fibers.size() + kWarp - 1) / kWarp);
    std::iota(warps.begin(), warps.end(), size_t{0});
    for (;;) {
        std::shuffle(warps.begin(), warps.end(), order_source);
        bool moved = false;
        for (const size_t warp : warps) {
            while (step_warp(warp * kWarp, order_source)) {
                moved = true;
                if (order_source() % 4 == 0) break;
            }
        }
        moved |= serve_block();
        if (!machine.error.empty()) return false;
        if (moved) continue;
        size_t odd = 0;  // a thread that is elsewhere than thread 0
        for (size_t i = 0; i < fibers.size(); ++i) {
            if (fibers[i].state != fibers[0].state || fibers[i].line != fibers[0].line) odd = i;
        }
        if (odd == 0 && fibers[0].state == State::kDone) return true;
        machine.error = "threads do not meet: " + position(0) + ", " + position(odd);
        return false;
    }
}

template <class Arguments>
struct Launch {
    void (*kernel)(Arguments);
    const Arguments* arguments;
    static void run(void* self) {
        const Launch* launch = static_cast<const Launch*>(self);
        launch->kernel(*launch->arguments);
    }
};

}  // namespace emulation

template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
    using emulation::machine;
    emulation::Launch<Arguments> launch = {kernel, &arguments};
    machine.entry = emulation::Launch<Arguments>::run;
    machine.argument = &launch;
    machine.error.clear();
    machine.fibers.resize(config->blockDim.x);
    for (emulation::Fiber& fiber : machine.fibers)
        if (!fiber.stack) fiber.stack.reset(new char[emulation::kStackBytes]);
    std::mt19937 order_source(machine.seed);
    std::vector<unsigned> blocks(config->gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), order_source);
    for (const unsigned block : blocks)
        if (!emulation::run_block(block, order_source)) return cudaErrorLaunchFailure;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::machine.error.c_str(); }

// ---- Device functions ----

#define __syncthreads() emulation::wait(emulation::Operation::kBlockBarrier, __LINE__, 0, 0)
#define __syncwarp() emulation::wait(emulation::Operation::kWarpBarrier, __LINE__, 0, 0)
#define __ballot_sync(mask, predicate) \
    emulation::wait(emulation::Operation::kBallot, __LINE__, emulation::full(mask) && (predicate), 0)
#define __shfl_xor_sync(mask, value, lanes)                                                           \
    __uint_as_float(emulation::wait(emulation::Operation::kShuffle, __LINE__, __float_as_uint(value), \
                                    emulation::full(mask) ? static_cast<unsigned>(lanes) : 0))

namespace emulation {
// Only warp operations of all lanes are emulated.
inline bool full(unsigned mask) {
    if (mask != 0xffffffffu) machine.error = "a warp operation without all lanes";
    return true;
}
}  // namespace emulation

inline unsigned __float_as_uint(float value) { return gpstoken::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return gpstoken::float_of(bits); }
inline float __half2float_bits(unsigned short bits) { return gpstoken::to_float(gpstoken::Float16{bits}); }
inline unsigned short __float2half_bits(float value) { return gpstoken::from_float<gpstoken::Float16>(value).bits; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline int atomicAdd(int* target, int value) { return (*target += value) - value; }  // fibers switch at barriers only
