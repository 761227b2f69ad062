// parallel_for: items 0..count-1 handed out one at a time to a few threads.
//
// Where PyTorch works with OpenMP threads, they do this work too: after each of its operations they wait for the next
// by running in circles, so that threads of our own would share processors with them. Elsewhere threads are started per
// call and joined before it returns; a pool of our own would save some 20 us per thread, but it would also have to
// survive fork (data loader workers), library unloading and nested calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#endif

namespace gpstoken {

// How many threads are worth starting for so many numbers of a map. Starting one takes some 20 us: each must have more
// than that to do.
inline int useful_threads(int64_t numbers, int num_threads) {
    constexpr int64_t kNumbersPerThread = 64 * 1024;
    return static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), 1 + numbers / kNumbersPerThread));
}

// Calls function(data) on every thread of the calling thread's OpenMP team, that one among them, and returns when all
// have. The entry point is that of GCC's compiled code; LLVM's and Intel's runtimes have it as well.
using RunOnTeam = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__linux__)
// Whether this process came from another by fork, and not by exec since: PF_FORKNOEXEC (0x40) of the flags that the
// kernel shows behind the name of the program, its state and five numbers.
inline bool came_by_fork() {
    std::ifstream file("/proc/self/stat");
    std::string line, number;
    std::getline(file, line);
    std::istringstream rest(line.substr(line.rfind(')') + 1));
    for (int i = 0; i < 7; ++i) rest >> number;
    return (std::strtoul(number.c_str(), nullptr, 10) & 0x40) != 0;
}

// A fork leaves the threads behind, but OpenMP still counts on them and would wait for ever. It may come before this
// library is loaded, or after.
inline std::atomic<bool> is_forked{came_by_fork()};
inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

// Of the OpenMP runtime that this process has loaded; null if there is none, or it cannot be used.
inline RunOnTeam openmp_team() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<RunOnTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return is_forked ? nullptr : found;
#else
    return nullptr;
#endif
}

// Calls body(item, worker) once for every item, on at most num_threads threads (the caller's among them); worker, in
// 0..num_threads-1, names the thread, so that each can have its scratch memory. Items are taken in rising order, so
// uneven ones balance. body must not throw: allocate before, not inside.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
    const int wanted = static_cast<int>(std::min<int64_t>(num_threads, count));
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    auto work = [&] {
        const int worker = workers++;
        if (worker >= wanted) return;
        for (int64_t item = next++; item < count; item = next++) body(item, worker);
    };
    const RunOnTeam run_on_team = wanted > 1 ? openmp_team() : nullptr;
    if (run_on_team != nullptr) {
        // All of them, though fewer may be wanted: OpenMP ends the threads that a smaller team leaves out.
        using Work = decltype(work);
        run_on_team([](void* data) { (*static_cast<Work*>(data))(); }, &work, 0, 0);
        return;
    }
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(static_cast<size_t>(std::max(wanted, 0)));
        for (int more = 1; more < wanted; ++more) helpers.emplace_back(std::ref(work));
    } catch (const std::system_error&) {
        // The system gives no more threads: those that started, and this one, do the work.
    }
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace gpstoken
