#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>

#include "gpstoken_native.h"

namespace gpstoken {
namespace {

Isa find_best_isa() {
#if defined(GPSTOKEN_X86_DISPATCH)
    const char* wish = std::getenv("GPSTOKEN_CPU_ISA");
    const auto allowed = [wish](const char* name) { return !wish || !*wish || !std::strcmp(wish, name); };
    __builtin_cpu_init();
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Isa::kAvx512;
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
    return Isa::kBaseline;
}

}  // namespace

Isa best_isa() {
    static const Isa best = find_best_isa();
    return best;
}

}  // namespace gpstoken

int gpstoken_abi_version(void) { return GPSTOKEN_ABI_VERSION; }

const char* gpstoken_cpu_isa(void) {
    switch (gpstoken::best_isa()) {
        case gpstoken::Isa::kAvx512:
            return "avx512";
        case gpstoken::Isa::kAvx2:
            return "avx2";
        default:
            return "baseline";
    }
}
