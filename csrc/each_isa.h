// Includes GPSTOKEN_KERNEL_FILE, quoted, once per instruction set: in the namespaces avx512, avx2 and baseline, with
// GPSTOKEN_TARGET and GPSTOKEN_VECTOR_LANES as vector_cpu.h wants them. No include guard, therefore.
#if defined(GPSTOKEN_X86_DISPATCH)
namespace avx512 {
#define GPSTOKEN_TARGET GPSTOKEN_TARGET_AVX512
#define GPSTOKEN_VECTOR_LANES 16
#include GPSTOKEN_KERNEL_FILE
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_LANES
}  // namespace avx512
namespace avx2 {
#define GPSTOKEN_TARGET GPSTOKEN_TARGET_AVX2
#define GPSTOKEN_VECTOR_LANES 8
#include GPSTOKEN_KERNEL_FILE
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_LANES
}  // namespace avx2
#endif
namespace baseline {
#define GPSTOKEN_TARGET
#define GPSTOKEN_VECTOR_LANES 4
#include GPSTOKEN_KERNEL_FILE
#undef GPSTOKEN_TARGET
#undef GPSTOKEN_VECTOR_LANES
}  // namespace baseline
#undef GPSTOKEN_KERNEL_FILE
