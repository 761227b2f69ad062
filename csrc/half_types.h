// float16 and bfloat16, as the bits that torch stores, to and from float32. Round to nearest, ties to even.
// Without branches, so that loops over them vectorise on any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace gpstoken {

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    const float rebiased = float_of(magnitude) * 0x1p112f;  // exponent bias 15 -> 127; exact for subnormals too
    const uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return float_of(bits_of(rebiased) | infinite | sign);
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
inline Float16 from_float<Float16>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal numbers: rebias the exponent and round; a carry past the largest becomes infinity by itself.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormals: adding 0.5 lets the float32 adder round at the right place.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>(result | sign)};
}

}  // namespace gpstoken
