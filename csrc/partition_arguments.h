// What the host has to know of the CUDA kernels of the partition: sizes of blocks, arguments, what lies in memory.
//
// Nothing here belongs to the device, so a compiler that knows no CUDA takes it (nvrtc_launch.h).
#pragma once

#include "partition_shared.h"

namespace gpstoken {
namespace cuda {

// A picture and what a region's complexity needs besides.
struct Picture {
    const float* grey;  // (height, width); what is outside [-1, 1] is cut off
    const double*
        bias_sums;        // (height, width): of the user's bias above and left of each pixel, itself included; or null
    const double* terms;  // entropy_term() of each count
    int height, width;
    double exponent;
};

// ---- partition_bias.cuh ----

constexpr int kBiasThreads = 64;

struct BiasSums {
    const float* bias;  // (batch, height, width)
    double* sums;
    int height, width;
    long long lines;  // rows, or columns, of the whole batch
};

// ---- partition_levels.cuh ----

constexpr int kMostLevels = 24;
constexpr int kLevelThreads = 256;

// The first levels of one size of image.
struct Levels {
    int count;
    int start[kMostLevels + 1];      // of each level in the table of an image; the last: the table's size
    int fewest_cuts_x[kMostLevels];  // of any region of a level
};

struct PartitionLevels {
    Picture picture;  // the first of the batch; the others follow it
    Levels levels;
    int min_region_size;
    double* table;  // (batch, size of the table): complexities
};

// ---- partition_list.cuh ----

constexpr int kListThreads = 512;

// A region by its place among all that there can be.
struct Place {
    int cuts_x, cuts_y, x, y;
};

struct ListedRegion {
    Box box;
    Place place;
    double complexity;
    bool alive;  // not yet cut
};

// A region in the queue, or in the order of tokens.
struct alignas(16) Entry {
    double complexity;
    int index;  // in the list
};

// The host reckons scratch memory with these sizes. Its compiler need not be the one of the kernels.
static_assert(sizeof(ListedRegion) == 48 && sizeof(Entry) == 16, "unexpected layout in memory");

struct PartitionList {
    Picture picture;  // the first of the batch; the others follow it
    Levels levels;
    const double* table;  // (batch, size of the table)
    ListedRegion* list;   // (batch, list_size): all regions ever made, in that order
    Entry* entries;       // (batch, entries_size): a power of two, at least list_size
    int* regions;         // (batch, tokens, 4)
    double* complexity;   // (batch, tokens), or null
    int tokens, min_region_size, list_size, entries_size;
};

}  // namespace cuda
}  // namespace gpstoken
