// Vectors of floats for the inner loops of the CPU. A *_cpu_kernel.h includes this first; its .cpp includes that once
// per instruction set, inside a namespace, with
//   GPSTOKEN_TARGET        the function attribute that switches the instruction set on (may be empty)
//   GPSTOKEN_VECTOR_LANES  floats per vector register
// No include guard, therefore.

constexpr int kLanes = GPSTOKEN_VECTOR_LANES;

#if defined(__GNUC__)
#define GPSTOKEN_KERNEL __attribute__((always_inline)) GPSTOKEN_TARGET inline
typedef float Vector __attribute__((vector_size(GPSTOKEN_VECTOR_LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(GPSTOKEN_VECTOR_LANES * 4)));
GPSTOKEN_KERNEL Vector broadcast(float value) { return value - Vector{}; }
#else
#define GPSTOKEN_KERNEL inline
struct Vector {
    float lane[kLanes];
    float operator[](int i) const { return lane[i]; }
};
#define GPSTOKEN_OPERATOR(op)                                                \
    inline Vector operator op(const Vector& a, const Vector& b) {            \
        Vector r;                                                            \
        for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] op b.lane[i]; \
        return r;                                                            \
    }
GPSTOKEN_OPERATOR(+)
GPSTOKEN_OPERATOR(-)
GPSTOKEN_OPERATOR(*)
#undef GPSTOKEN_OPERATOR
inline Vector& operator+=(Vector& a, const Vector& b) { return a = a + b; }
inline Vector broadcast(float value) {
    Vector r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = value;
    return r;
}
#endif

GPSTOKEN_KERNEL Vector load(const float* from) {
    Vector v;
    memcpy(&v, from, sizeof(v));
    return v;
}

GPSTOKEN_KERNEL void store(float* to, const Vector& v) { memcpy(to, &v, sizeof(v)); }

// ---- 16-bit numbers, see half_types.h ----

#if defined(__GNUC__)
typedef uint16_t Halves __attribute__((vector_size(GPSTOKEN_VECTOR_LANES * 2)));

#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
GPSTOKEN_KERNEL Integers lane_numbers() { return Integers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#endif

// The lanes whose high halves these are, with zeros below. GCC 12 makes seven instructions of __builtin_convertvector
// where one or two do.
GPSTOKEN_KERNEL Integers from_high_halves(const Halves& h) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    const __m512i words = _mm512_maskz_broadcast_i64x4(0xff, (__m256i)h);
    const Integers from = lane_numbers() << 16;  // for the second word of lane i, word i
    return (Integers)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)from, words);
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    return (Integers)_mm256_cvtepu16_epi32((__m128i)h) << 16;
#elif defined(__SSE2__)
    __m128i low;
    memcpy(&low, &h, sizeof(h));
    return (Integers)_mm_unpacklo_epi16(_mm_setzero_si128(), low);
#else
    return __builtin_convertvector(h, Integers) << 16;
#endif
}

GPSTOKEN_KERNEL Halves high_halves(const Integers& bits) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    const Integers from = lane_numbers() * 0x00040004 + 0x00030001;  // for word i, word 2 i + 1
    const __m512i words = _mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)from, (__m512i)bits);
    Halves h;
    memcpy(&h, &words, sizeof(h));
    return h;
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    const __m256i halves = (__m256i)(bits >> 16);
    return (Halves)_mm_packs_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
#elif defined(__SSE2__)
    const __m128i packed = _mm_packs_epi32((__m128i)(bits >> 16), _mm_setzero_si128());
    Halves h;
    memcpy(&h, &packed, sizeof(h));
    return h;
#else
    return __builtin_convertvector(bits >> 16, Halves);
#endif
}

GPSTOKEN_KERNEL Vector load(const BFloat16* from) {
    Halves h;
    memcpy(&h, from, sizeof(h));
    return (Vector)from_high_halves(h);
}

GPSTOKEN_KERNEL void store(BFloat16* to, const Vector& v) {
    const Integers bits = (Integers)v, nan = Integers{} + 0x7fc00000;
    const Integers rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves h = high_halves(v == v ? rounded : nan);
    memcpy(to, &h, sizeof(h));
}

GPSTOKEN_KERNEL Vector load(const Float16* from) {
    Halves h;
    memcpy(&h, from, sizeof(h));
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    return (Vector)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#else
    const Integers bits = from_high_halves(h), magnitude = (bits >> 3) & 0x0fffe000;
    const Vector rebiased = (Vector)magnitude * broadcast(0x1p112f);
    const Integers infinite = (magnitude >= 0x0f800000) & 0x7f800000;
    return (Vector)((Integers)rebiased | infinite | (bits & (Integers)broadcast(-0.0f)));
#endif
}

GPSTOKEN_KERNEL void store(Float16* to, const Vector& v) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    const Halves h = (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const Integers bits = (Integers)v, magnitude = bits & 0x7fffffff;
    const Integers normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) << 3;
    const Integers subnormal = ((Integers)((Vector)magnitude + broadcast(0.5f)) - 0x3f000000) << 16;
    const Integers infinity = Integers{} + 0x7c000000, nan = Integers{} + 0x7e000000;
    const Integers large = magnitude > 0x7f800000 ? nan : infinity, small = magnitude < 0x38800000 ? subnormal : normal;
    const Halves h = high_halves((magnitude >= 0x47800000 ? large : small) | (bits & (Integers)broadcast(-0.0f)));
#endif
    memcpy(to, &h, sizeof(h));
}
#else
template <class T>
GPSTOKEN_KERNEL Vector load(const T* from) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(from[i]);
    return load(lanes);
}

template <class T>
GPSTOKEN_KERNEL void store(T* to, const Vector& v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) to[i] = from_float<T>(lanes[i]);
}
#endif

// ---- arithmetic ----

// In parts, so that not every addition waits for the one before.
GPSTOKEN_KERNEL float sum(const Vector& v) {
    float lanes[kLanes];
    store(lanes, v);
#if defined(__GNUC__)
    typedef float Four __attribute__((vector_size(16)));
    Four total = {};
    for (int i = 0; i < kLanes; i += 4) {
        Four part;
        memcpy(&part, lanes + i, sizeof(part));
        total += part;
    }
    return (total[0] + total[2]) + (total[1] + total[3]);
#else
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// 1 / x for x in [1, 2^127], within 2^-11 of itself.
GPSTOKEN_KERNEL Vector rough_reciprocal(const Vector& x) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    return (Vector)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // 14 bits
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    return (Vector)_mm256_rcp_ps((__m256)x);  // 12 bits
#elif defined(__GNUC__)
    return broadcast(1.0f) / x;
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = 1.0f / x[i];
    return result;
#endif
}

// The same within 2 units in the last place; a division takes as long as a dozen multiplications.
GPSTOKEN_KERNEL Vector reciprocal(const Vector& x) {
    const Vector r = rough_reciprocal(x);
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES >= 8
    return r * (broadcast(2.0f) - x * r);  // Newton's step doubles the bits
#else
    return r;
#endif
}

GPSTOKEN_KERNEL Vector quotient(const Vector& a, const Vector& b) {
#if defined(__GNUC__)
    return a / b;
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = a[i] / b[i];
    return result;
#endif
}

// The larger of two numbers; `b` where `a` is none.
GPSTOKEN_KERNEL Vector larger(const Vector& a, const Vector& b) {
#if defined(__GNUC__)
    return a > b ? a : b;
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
#endif
}

#if defined(__GNUC__)
// The number of smaller magnitude, x or limit > 0, with the sign of x; any of the two where x is none.
GPSTOKEN_KERNEL Vector limited(const Vector& x, const Vector& limit) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    return (Vector)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)limit, 2);
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    return (Vector)_mm256_max_ps(_mm256_min_ps((__m256)x, (__m256)limit), (__m256)-limit);
#else
    return larger(broadcast(0.0f) - limit, x < limit ? x : limit);
#endif
}

// exp(x) for x in [-86, 88], by the Taylor series of its fractional part up to degree 7, which leaves 6e-9 and the
// result within 2 units in the last place, or 4, which leaves 5e-5.
template <int kDegree>
GPSTOKEN_KERNEL Vector exp_normal(const Vector& x) {
    constexpr float kTaylor[] = {1.0f,         1.0f,          0.5f,          1.0f / 6.0f,
                                 1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vector shifted = x * broadcast(1.44269504f) + magic;
    const Vector n = shifted - magic;
    // r = x - n ln 2 with ln 2 in two parts, the first short enough for n times it to be exact; |r| <= 0.3466.
    const Vector r = x - n * broadcast(0.693359375f) + n * broadcast(2.12194440e-4f);
    Vector p = broadcast(kTaylor[kDegree]);
    for (int k = kDegree - 1; k >= 0; --k) p = p * r + broadcast(kTaylor[k]);
    // Times 2^n: n, in the low bits of `shifted`, goes to the exponent.
    return (Vector)((Integers)p + ((Integers)shifted << 23));
}
#endif

// exp(x) for x <= 0, within 2 units in the last place; 0 below -86, where it would leave the normal numbers.
GPSTOKEN_KERNEL Vector exp_nonpositive(const Vector& x) {
#if defined(__GNUC__)
    const Integers keep = x >= broadcast(-86.0f);
    return (Vector)((Integers)exp_normal<7>((Vector)((Integers)x & keep)) & keep);
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = x[i] >= -86.0f ? std::exp(x[i]) : 0.0f;
    return result;
#endif
}
