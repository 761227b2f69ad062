// Which instruction set the CPU library uses, decided once at run time, and the names that go with each.
//
// A .cpp includes its *_cpu_kernel.h in up to three namespaces, avx512, avx2 and baseline, with GPSTOKEN_TARGET set to
// what the functions of each may use (each_isa.h does so), and calls those of best_isa().
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
#define GPSTOKEN_X86_DISPATCH 1
#define GPSTOKEN_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define GPSTOKEN_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace gpstoken {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this processor, or a lesser one that GPSTOKEN_CPU_ISA names (for tests and diagnosis).
Isa best_isa();

}  // namespace gpstoken
