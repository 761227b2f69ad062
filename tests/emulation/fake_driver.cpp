// A stand-in for libcuda.so on a machine without a GPU: it finds kernels by the names that NVRTC gave them, which are
// those that this compiler gives the same kernels, and runs these by emulation on host memory.
//
// It knows two devices, 0 and 1, whose primary contexts are 100 and 101; a context c belongs to device c % 100. The
// library also exports what csrc/*_cuda.cu do when nvcc compiles them: what launches without a driver.

#include <dlfcn.h>

#include <deque>
#include <functional>
#include <map>
#include <utility>

#include "splat_cuda.cu"

// After it, as it has the types of half_types.h in sight.
#include "partition_cuda.cu"

namespace {

using Runner = std::function<cudaError_t(const cudaLaunchConfig_t&, const void*)>;

std::map<std::string, Runner> kernels;
struct Function {  // as a real one, it is of use in the context of its module only
    const Runner* run;
    size_t context;
};
std::vector<size_t> modules;  // their contexts
std::deque<Function> functions;
thread_local size_t current_context = 0;
int retained[2] = {};
int next_error = 0;
std::string journal;

template <class Arguments>
void add(void (*kernel)(Arguments)) {
    Dl_info found = {};
    dladdr(reinterpret_cast<void*>(kernel), &found);
    kernels[found.dli_sname == nullptr ? "a kernel without a name" : found.dli_sname] =
        [kernel](const cudaLaunchConfig_t& config, const void* arguments) {
            return cudaLaunchKernelEx(&config, kernel, *static_cast<const Arguments*>(arguments));
        };
}

template <class T>
void add_splat() {
    add(splat_forward_kernel<T, 4>);
    add(splat_forward_kernel<T, 8>);
    add(splat_forward_kernel<T, 16>);
    add(splat_forward_kernel<T, 32>);
    add(splat_backward_kernel<T, 4>);
    add(splat_backward_kernel<T, 8>);
    add(splat_backward_kernel<T, 16>);
    add(splat_backward_kernel<T, 32>);
}

const bool filled = [] {
    add_splat<float>();
    add_splat<gpstoken::cuda::Float16>();
    add_splat<gpstoken::cuda::BFloat16>();
    add(bias_rows_kernel);
    add(bias_columns_kernel);
    add(partition_levels_kernel);
    add(partition_list_kernel);
    return true;
}();

}  // namespace

extern "C" {

int cuGetErrorString(int code, const char** words) {
    *words = code == 719 ? emulation::machine.error.c_str() : code == 700 ? "an illegal address" : nullptr;
    return *words == nullptr;
}
int cuDeviceGet(int* handle, int device) {
    *handle = device;
    return device < 2 ? 0 : 101;
}
int cuCtxGetCurrent(size_t* context) {
    *context = current_context;
    return 0;
}
int cuCtxSetCurrent(size_t context) {
    current_context = context;
    return 0;
}
int cuCtxGetDevice(int* device) {
    *device = static_cast<int>(current_context % 100);
    return current_context == 0 ? 201 : 0;
}
int cuDevicePrimaryCtxRetain(size_t* context, int device) {
    ++retained[device];
    *context = 100 + static_cast<size_t>(device);
    return 0;
}
int cuModuleLoadData(size_t* module, const char* code) {
    if (current_context == 0) return 201;
    const bool is_binary = strncmp(code, "\177ELF", 4) == 0;
    const bool is_assembly = strncmp(code, "//\n// Generated", 15) == 0;
    if (!is_binary && !is_assembly) return 200;
    modules.push_back(current_context);
    *module = modules.size();
    return 0;
}
int cuModuleGetFunction(const Function** function, size_t module, const char* name) {
    const auto found = kernels.find(name);
    if (found == kernels.end()) return 500;
    *function = &functions.emplace_back(Function{&found->second, modules[module - 1]});
    return 0;
}
int cuLaunchKernel(const Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    if (y != 1 || z != 1 || shared != 0 || extra != nullptr) return 1;
    if (function->context != current_context) return 400;
    journal += std::to_string(current_context) + " " + std::to_string(reinterpret_cast<size_t>(stream)) + " " +
               std::to_string(x) + " " + std::to_string(threads) + "\n";
    if (next_error != 0) return std::exchange(next_error, 0);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(x);
    config.blockDim = dim3(threads);
    return (*function->run)(config, parameters[0]);
}

// ---- for tests ----

void fake_fail_next_launch(int code) { next_error = code; }
int fake_modules() { return static_cast<int>(modules.size()); }
int fake_retained(int device) { return retained[device]; }
// Context, stream, blocks and threads of each launch since the last call.
const char* fake_launches() {
    static std::string answer;
    answer = std::exchange(journal, "");
    return answer.c_str();
}

}  // extern "C"
