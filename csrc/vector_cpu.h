// Vectors of floats for the inner loops of the CPU. A *_cpu_kernel.h includes this first; its .cpp includes that once per
// instruction set, inside a namespace, with
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
#define GPSTOKEN_OPERATOR(op)                                        \
    inline Vector operator op(const Vector& a, const Vector& b) {    \
        Vector r;                                                    \
        for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] op b.lane[i]; \
        return r;                                                    \
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

// One instruction each, where GCC 12 makes seven of __builtin_convertvector.
GPSTOKEN_KERNEL Integers widen(const Halves& h) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    return (Integers)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    return (Integers)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, Integers);
#endif
}

GPSTOKEN_KERNEL Halves narrow(const Integers& bits) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits);
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

GPSTOKEN_KERNEL Vector load(const BFloat16* from) {
    Halves h;
    memcpy(&h, from, sizeof(h));
    return (Vector)(widen(h) << 16);
}

GPSTOKEN_KERNEL void store(BFloat16* to, const Vector& v) {
    const Integers bits = (Integers)v, nan = v != v;
    const Integers rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves h = narrow(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16);
    memcpy(to, &h, sizeof(h));
}
#endif

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

// 1 / x for x in [1, 2], within 2 units in the last place; a division takes as long as a dozen multiplications.
GPSTOKEN_KERNEL Vector reciprocal(const Vector& x) {
#if defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 16
    const Vector r = (Vector)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // 14 bits; Newton's step doubles them
    return r * (broadcast(2.0f) - x * r);
#elif defined(GPSTOKEN_X86_DISPATCH) && GPSTOKEN_VECTOR_LANES == 8
    const Vector r = (Vector)_mm256_rcp_ps((__m256)x);  // 12 bits
    return r * (broadcast(2.0f) - x * r);
#elif defined(__GNUC__)
    return broadcast(1.0f) / x;
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = 1.0f / x[i];
    return result;
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
    const Integers keep = a > b;
    return (Vector)(((Integers)a & keep) | ((Integers)b & ~keep));
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
#endif
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -86, where it would leave the normal numbers.
GPSTOKEN_KERNEL Vector exp_nonpositive(const Vector& x) {
#if defined(__GNUC__)
    const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Integers keep = x >= broadcast(-86.0f);
    const Vector clamped = (Vector)((Integers)x & keep);
    const Vector shifted = clamped * broadcast(1.44269504f) + magic;
    const Vector n = shifted - magic;
    // r = x - n ln 2 with ln 2 in two parts, the first short enough for n times it to be exact; |r| <= 0.3466.
    const Vector r = clamped - n * broadcast(0.693359375f) + n * broadcast(2.12194440e-4f);
    // The Taylor series up to r^7 / 7!: its remainder is below 6e-9.
    Vector p = broadcast(1.0f / 5040.0f);
    p = p * r + broadcast(1.0f / 720.0f);
    p = p * r + broadcast(1.0f / 120.0f);
    p = p * r + broadcast(1.0f / 24.0f);
    p = p * r + broadcast(1.0f / 6.0f);
    p = p * r + broadcast(0.5f);
    p = p * r + broadcast(1.0f);
    p = p * r + broadcast(1.0f);
    // Times 2^n: n, in the low bits of `shifted`, goes to the exponent.
    return (Vector)(((Integers)p + ((Integers)shifted << 23)) & keep);
#else
    Vector result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = x[i] >= -86.0f ? std::exp(x[i]) : 0.0f;
    return result;
#endif
}
