// The partition of an image on the GPU: the list of its regions, and how it grows. One block per image.
//
// The first thread keeps the list, and the queue of regions that can be cut; it is busy for about a microsecond per
// cut. Complexities are read from the table of partition_levels.cuh, or else measured by the whole block.
#pragma once

#include "partition_levels.cuh"

namespace gpstoken {
namespace cuda {

__device__ __forceinline__ bool comes_first(const Entry& a, const Entry& b) {
    return gpstoken::comes_first(a.complexity, a.index, b.complexity, b.index);
}

struct ListShared {
    Measured<kAtOnce> measured;
    int to_measure;  // how many of `measured`; 0: the table had them
};

// ---- a heap, the first one on top ----

__device__ __forceinline__ void push(Entry* heap, int& count, const Entry& entry) {
    int at = count++;
    while (at > 0) {
        const int parent = (at - 1) / 2;
        if (!comes_first(entry, heap[parent])) break;
        heap[at] = heap[parent];
        at = parent;
    }
    heap[at] = entry;
}

__device__ __forceinline__ int pop(Entry* heap, int& count) {
    const int top = heap[0].index;
    const Entry moved = heap[--count];
    int at = 0;
    for (int child = 1; child < count; child = 2 * at + 1) {
        if (child + 1 < count && comes_first(heap[child + 1], heap[child])) ++child;
        if (!comes_first(heap[child], moved)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
    return top;
}

// ---- the list ----

// The first thread's view of an image's list.
struct List {
    const PartitionList& args;
    ListedRegion* regions;
    Entry* queue;
    const double* table;
    int made, waiting;

    __device__ __forceinline__ void add(const Box& box, const Place& place, double complexity) {
        regions[made] = {box, place, complexity, true};
        if (splittable(box, args.min_region_size)) push(queue, waiting, {complexity, made});
        ++made;
    }

    // shared.box[i]: what may come of cutting a region. A square has four halves, i = 0, 1 along x and 2, 3 along y;
    // others have two. Fills in shared.complexity if the table has them, else says how many to measure.
    __device__ __forceinline__ void propose(const ListedRegion& region, ListShared& shared) const {
        const int extent_x = region.box.x1 - region.box.x0, extent_y = region.box.y1 - region.box.y0;
        const int halves = extent_x == extent_y ? 4 : 2;
        const bool known = region.place.cuts_x + region.place.cuts_y + 1 < args.levels.count;
        for (int i = 0; i < halves; ++i) {
            const bool along_x = halves == 4 ? i < 2 : extent_x > extent_y;
            shared.measured.box[i] = half_of(region.box, along_x, i % 2);
            if (known) shared.measured.complexity[i] = table[slot(args.levels, half_of(region.place, along_x, i % 2))];
        }
        shared.to_measure = known ? 0 : halves;
    }

    // Cuts a region into two of the proposed halves.
    __device__ __forceinline__ void cut(ListedRegion& region, const Measured<kAtOnce>& halves) {
        const int extent_x = region.box.x1 - region.box.x0, extent_y = region.box.y1 - region.box.y0;
        const double* const c = halves.complexity;
        const bool square = extent_x == extent_y;
        const bool along_x = square ? square_is_cut_along_x(c[0], c[1], c[2], c[3]) : extent_x > extent_y;
        const int from = square && !along_x ? 2 : 0;
        const Place place = region.place;
        region.alive = false;
        add(halves.box[from], half_of(place, along_x, false), c[from]);
        add(halves.box[from + 1], half_of(place, along_x, true), c[from + 1]);
    }
};

// ---- the order of tokens ----

// Sorts a power of two of entries, the first one first: a bitonic network, each step by all threads of the block.
__device__ __forceinline__ void sort(Entry* entries, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); i < size; i += kListThreads) {
                const int other = i ^ distance;
                if (other < i) continue;
                const Entry a = entries[i], b = entries[other];
                if (((i & run) == 0) == comes_first(a, b)) continue;
                entries[i] = b;
                entries[other] = a;
            }
        }
    }
    __syncthreads();
}

// The list as the reference leaves it: sorted before the last cut, whose halves come at the end.
__device__ __forceinline__ void write_tokens(const PartitionList& args, long long image, const ListedRegion* list,
                                             Entry* entries) {
    const int made = 2 * args.tokens - 1, sorted = max(made - 2, 0);
    for (int i = static_cast<int>(threadIdx.x); i < args.entries_size; i += kListThreads) {
        const bool counts = i < sorted && list[i].alive;
        entries[i] = counts ? Entry{list[i].complexity, i} : Entry{-2 * kLargestComplexity, 0};
    }
    sort(entries, args.entries_size);
    const int last = min(args.tokens, 2);  // tokens that are not sorted
    for (int i = static_cast<int>(threadIdx.x); i < args.tokens; i += kListThreads) {
        const ListedRegion& region = list[i < args.tokens - last ? entries[i].index : made - args.tokens + i];
        const long long token = image * args.tokens + i;
        args.regions[4 * token] = region.box.x0;
        args.regions[4 * token + 1] = region.box.y0;
        args.regions[4 * token + 2] = region.box.x1;
        args.regions[4 * token + 3] = region.box.y1;
        if (args.complexity != nullptr) args.complexity[token] = region.complexity;
    }
}

__global__ void __launch_bounds__(kListThreads, 1) partition_list_kernel(const PartitionList args) {
    GPSTOKEN_SHARED(ListShared, shared);
    const long long image = blockIdx.x;
    const Picture picture = nth(args.picture, image);
    const bool keeps_list = threadIdx.x == 0;
    List list = {args,
                 args.list + image * args.list_size,
                 args.entries + image * args.entries_size,
                 args.table + image * args.levels.start[args.levels.count],
                 0,
                 0};
    const Box whole = {0, 0, picture.width - 1, picture.height - 1};
    if (keeps_list) {
        shared.measured.box[0] = whole;
        if (args.levels.count > 0) shared.measured.complexity[0] = list.table[0];
    }
    if (args.levels.count == 0) measure<kListThreads>(picture, 1, shared.measured);
    if (keeps_list) list.add(whole, Place{0, 0, 0, 0}, shared.measured.complexity[0]);

    for (int tokens = 1; tokens < args.tokens; ++tokens) {
        // The host has made sure that there are as many regions as tokens, so the queue is never empty.
        int chosen = 0;
        if (keeps_list) {
            chosen = pop(list.queue, list.waiting);
            list.propose(list.regions[chosen], shared);
        }
        __syncthreads();
        const int to_measure = shared.to_measure;
        if (to_measure > 0) measure<kListThreads>(picture, to_measure, shared.measured);
        if (keeps_list) list.cut(list.regions[chosen], shared.measured);
        __syncthreads();
    }
    __syncthreads();
    write_tokens(args, image, list.regions, list.queue);
}

}  // namespace cuda
}  // namespace gpstoken
