// All regions that an image of one size can ever be cut into, and the kernel that measures those of the upper levels.
//
// Cutting never looks at the picture except where a square is cut along one axis or the other, so all candidates are
// known beforehand: 2,729 of them for 256 px and a smallest region of 8 px, of which 256 tokens need some 750. Many
// blocks measure those of the first levels at once, before one block per image (partition_list.cuh) makes its choices,
// of which each must wait for the last.
//
// A region that was cut a times along x and b times along y is the place_x-th of 2^a columns and the place_y-th of 2^b
// rows. Regions of one level, a + b, with the same a make a set of 2^level.
#pragma once

#include "partition_device.cuh"

namespace gpstoken {
namespace cuda {

__device__ __forceinline__ Place half_of(const Place& place, bool along_x, bool second) {
    Place half = place;
    if (along_x) {
        ++half.cuts_x;
        half.x = 2 * half.x + second;
    } else {
        ++half.cuts_y;
        half.y = 2 * half.y + second;
    }
    return half;
}

// Where the table has a region of one of its levels.
__device__ __forceinline__ int slot(const Levels& levels, const Place& place) {
    const int level = place.cuts_x + place.cuts_y;
    const int set = place.cuts_x - levels.fewest_cuts_x[level];
    return levels.start[level] + (set << level) + (place.x << place.cuts_y) + place.y;
}

__device__ __forceinline__ Place place_of(const Levels& levels, int slot) {
    int level = 0;
    while (slot >= levels.start[level + 1]) ++level;
    const int within = slot - levels.start[level];
    const int cuts_x = levels.fewest_cuts_x[level] + (within >> level);
    const int cuts_y = level - cuts_x, in_set = within & ((1 << level) - 1);
    return {cuts_x, cuts_y, in_set >> cuts_y, in_set & ((1 << cuts_y) - 1)};
}

// Cuts a region along one axis until it is the place-th of 2^cuts.
__device__ __forceinline__ Box descend(Box box, bool along_x, int cuts, int place) {
    for (int bit = cuts - 1; bit >= 0; --bit) box = half_of(box, along_x, (place >> bit) & 1);
    return box;
}

__device__ __forceinline__ Picture nth(Picture picture, long long image) {
    const long long size = static_cast<long long>(picture.height) * picture.width;
    picture.grey += image * size;
    if (picture.bias_sums != nullptr) picture.bias_sums += image * size;
    return picture;
}

// Whether cutting one of two regions, the halves of which include this place, can be what the rules ask for.
__device__ __forceinline__ bool can_occur(const PartitionLevels& args, const Place& place) {
    if (place.cuts_x + place.cuts_y == 0) return true;
    const Box whole = {0, 0, args.picture.width - 1, args.picture.height - 1};
    for (int along_x = 0; along_x < 2; ++along_x) {
        const int cuts_x = place.cuts_x - along_x, cuts_y = place.cuts_y - 1 + along_x;
        if (cuts_x < 0 || cuts_y < 0) continue;
        const Box columns = descend(whole, true, cuts_x, place.x >> along_x);
        const Box cut = descend(columns, false, cuts_y, place.y >> (1 - along_x));
        const int extent_x = cut.x1 - cut.x0, extent_y = cut.y1 - cut.y0;
        if (splittable(cut, args.min_region_size) && (along_x ? extent_x >= extent_y : extent_y >= extent_x))
            return true;
    }
    return false;
}

struct LevelShared {
    Measured<1> measured;
    bool occurs;
};

// One block per region.
__global__ void __launch_bounds__(kLevelThreads, 2) partition_levels_kernel(const PartitionLevels args) {
    GPSTOKEN_SHARED(LevelShared, shared);
    const int size = args.levels.start[args.levels.count];
    const int at = static_cast<int>(blockIdx.x) % size;
    const long long image = static_cast<int>(blockIdx.x) / size;
    if (threadIdx.x == 0) {
        const Place place = place_of(args.levels, at);
        const Box whole = {0, 0, args.picture.width - 1, args.picture.height - 1};
        shared.measured.box[0] = descend(descend(whole, true, place.cuts_x, place.x), false, place.cuts_y, place.y);
        shared.occurs = can_occur(args, place);
    }
    __syncthreads();
    if (!shared.occurs) return;
    measure<kLevelThreads>(nth(args.picture, image), 1, shared.measured);
    if (threadIdx.x == 0) args.table[image * size + at] = shared.measured.complexity[0];
}

}  // namespace cuda
}  // namespace gpstoken
