// gpstoken_partition_error_cpu: partition of images into regions by the error that a coarse picture of each leaves, an
// image per thread.
//
// The reference is gpstoken_diffusers/ops/partition_error_reference.py; regions and order are the same, bit for bit.
// Sums are whole numbers, so that the error of a region takes four look-ups for each cell, whatever its size.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <queue>
#include <vector>

#include "gpstoken_native.h"
#include "parallel.h"
#include "partition_shared.h"

namespace gpstoken {
namespace {

constexpr int kCells = 6;                 // along each axis of a region
constexpr float kHalfRange = 511.5f;      // values are rounded to 1,024 steps of [-1, 1]
constexpr int64_t kMostPixels = 1 << 26;  // so that no product of sums over a cell overflows

struct ErrorSettings {
    int64_t planes, height, width, num_tokens;
    int min_region_size;
};

class ErrorPartitioner {
   public:
    explicit ErrorPartitioner(const ErrorSettings& settings)
        : settings_(settings),
          stride_(settings.width + 1),
          area_((settings.height + 1) * stride_),
          sums_(settings.planes * area_),
          squares_(settings.planes * area_),
          bias_(area_) {}

    // False if there are fewer leaves than tokens.
    bool run(const float* image, const float* bias, int32_t* out) {
        prepare(image, bias);
        regions_.clear();
        std::priority_queue<Candidate> candidates;
        const auto add = [&](const Box& box, double error) {
            if (splittable(box, settings_.min_region_size))
                candidates.push({error + attraction(box), static_cast<int64_t>(regions_.size())});
            regions_.push_back({box, true});
        };
        const Box whole{0, 0, static_cast<int>(settings_.width) - 1, static_cast<int>(settings_.height) - 1};
        add(whole, error(whole));
        for (int64_t count = 1; count < settings_.num_tokens; ++count) {
            if (candidates.empty()) return false;
            Region& chosen = regions_[candidates.top().index];
            candidates.pop();
            chosen.alive = false;
            const Halves halves = split(chosen.box);
            add(halves.first, halves.first_error);
            add(halves.second, halves.second_error);
        }
        for (const Region& region : regions_) {
            if (!region.alive) continue;
            *out++ = region.box.x0;
            *out++ = region.box.y0;
            *out++ = region.box.x1;
            *out++ = region.box.y1;
        }
        return true;
    }

   private:
    struct Region {
        Box box;
        bool alive;
    };
    struct Candidate {
        double priority;
        int64_t index;
        bool operator<(const Candidate& other) const {
            return comes_first(other.priority, other.index, priority, index);
        }
    };
    struct Halves {
        Box first, second;
        double first_error, second_error;
    };

    void prepare(const float* image, const float* bias) {
        has_bias_ = bias != nullptr;
        for (int64_t y = 0; y < settings_.height; ++y) {
            for (int64_t plane = 0; plane < settings_.planes; ++plane) {
                const float* row = image + (plane * settings_.height + y) * settings_.width;
                int64_t* sums = &sums_[plane * area_ + (y + 1) * stride_ + 1];
                int64_t* squares = &squares_[plane * area_ + (y + 1) * stride_ + 1];
                int64_t sum = 0, square = 0;
                for (int64_t x = 0; x < settings_.width; ++x) {
                    const int64_t value = std::lrint((row[x] + 1.0f) * kHalfRange);
                    sum += value;
                    square += value * value;
                    sums[x] = sums[x - stride_] + sum;
                    squares[x] = squares[x - stride_] + square;
                }
            }
            if (!has_bias_) continue;
            double sum = 0.0;
            for (int64_t x = 0; x < settings_.width; ++x) {
                sum += bias[y * settings_.width + x];
                bias_[(y + 1) * stride_ + x + 1] = bias_[y * stride_ + x + 1] + sum;
            }
        }
    }

    template <class T>
    T inside(const T* table, int x0, int y0, int x1, int y1) const {
        return table[y1 * stride_ + x1] - table[y0 * stride_ + x1] - table[y1 * stride_ + x0] +
               table[y0 * stride_ + x0];
    }

    double attraction(const Box& box) const {
        return has_bias_ ? inside(bias_.data(), box.x0, box.y0, box.x1 + 1, box.y1 + 1) : 0.0;
    }

    // Sum of squared distances to the mean of each cell, in [-1, 1]^2.
    double error(const Box& box) const {
        const int width = box.x1 - box.x0 + 1, height = box.y1 - box.y0 + 1;
        const int columns = std::min(kCells, width), rows = std::min(kCells, height);
        double total = 0.0;
        for (int row = 0; row < rows; ++row) {
            const int y0 = box.y0 + cell_edge(row, height, rows), y1 = box.y0 + cell_edge(row + 1, height, rows);
            for (int column = 0; column < columns; ++column) {
                const int x0 = box.x0 + cell_edge(column, width, columns);
                const int x1 = box.x0 + cell_edge(column + 1, width, columns);
                const int64_t pixels = static_cast<int64_t>(x1 - x0) * (y1 - y0);
                for (int64_t plane = 0; plane < settings_.planes; ++plane) {
                    const int64_t sum = inside(&sums_[plane * area_], x0, y0, x1, y1);
                    const int64_t square = inside(&squares_[plane * area_], x0, y0, x1, y1);
                    total += static_cast<double>(pixels * square - sum * sum) / static_cast<double>(pixels);
                }
            }
        }
        return total / (static_cast<double>(kHalfRange) * kHalfRange);
    }

    static int cell_edge(int cell, int length, int cells) {
        return static_cast<int>(static_cast<int64_t>(cell) * length / cells);
    }

    Halves halves(const Box& box, bool along_x) const {
        const Box first = half_of(box, along_x, false), second = half_of(box, along_x, true);
        return {first, second, error(first), error(second)};
    }

    Halves split(const Box& box) const {
        const int extent_x = box.x1 - box.x0, extent_y = box.y1 - box.y0;
        if (extent_x != extent_y) return halves(box, extent_x > extent_y);
        const Halves in_x = halves(box, true), in_y = halves(box, false);
        return in_x.first_error + in_x.second_error < in_y.first_error + in_y.second_error ? in_x : in_y;
    }

    ErrorSettings settings_;
    int64_t stride_, area_;
    std::vector<int64_t> sums_, squares_;  // summed-area tables, one for each plane
    std::vector<double> bias_;
    bool has_bias_ = false;
    std::vector<Region> regions_;  // all ever made, in that order
};

}  // namespace
}  // namespace gpstoken

extern "C" int gpstoken_partition_error_cpu(const float* image, const float* bias, int32_t* regions, int64_t B,
                                            int64_t C, int64_t H, int64_t W, int64_t N, int min_region_size,
                                            int num_threads) {
    using namespace gpstoken;
    if (B < 0 || C < 1 || H < 2 || W < 2 || H > kMostPixels / W || N < 1 || min_region_size < 2)
        return GPSTOKEN_INVALID_ARGUMENT;
    const ErrorSettings settings{C, H, W, N, min_region_size};
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(num_threads, B));
    std::atomic<int> result{GPSTOKEN_OK};
    std::atomic<int64_t> next{0};
    parallel_for(workers, static_cast<int>(workers), [&](int64_t, int) {
        try {
            ErrorPartitioner partitioner(settings);
            for (int64_t i = next++; i < B && result == GPSTOKEN_OK; i = next++)
                if (!partitioner.run(image + i * C * H * W, bias ? bias + i * H * W : nullptr, regions + i * N * 4))
                    result = GPSTOKEN_TOO_MANY_TOKENS;
        } catch (const std::bad_alloc&) {
            result = GPSTOKEN_OUT_OF_MEMORY;
        }
    });
    return result;
}
