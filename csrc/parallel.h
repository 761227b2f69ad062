// parallel_for: items 0..count-1 handed out one at a time to a few threads that live for one call.
//
// Threads are started per call and joined before it returns. A pool would save some 20 us per thread, but it would
// also have to survive fork (data loader workers), library unloading and nested calls; this needs none of that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gpstoken {

// How many threads are worth starting for so many numbers of a map. Starting one takes some 20 us: each must have more
// than that to do.
inline int useful_threads(int64_t numbers, int num_threads) {
    constexpr int64_t kNumbersPerThread = 64 * 1024;
    return static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), 1 + numbers / kNumbersPerThread));
}

// Calls body(item, worker) once for every item, on at most num_threads threads (the caller's among them); worker, in
// 0..num_threads-1, names the thread, so that each can have its scratch memory. Items are taken in rising order, so
// uneven ones balance. body must not throw: allocate before, not inside.
template <class Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int worker) {
        for (int64_t item = next++; item < count; item = next++) body(item, worker);
    };
    std::vector<std::thread> helpers;
    const int wanted = static_cast<int>(std::min<int64_t>(num_threads, count));
    try {
        helpers.reserve(static_cast<size_t>(std::max(wanted, 0)));
        for (int worker = 1; worker < wanted; ++worker) helpers.emplace_back(work, worker);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that started, and this one, do the work.
    }
    work(0);
    for (auto& helper : helpers) helper.join();
}

}  // namespace gpstoken
