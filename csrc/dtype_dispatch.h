// From the C interface's number of an element type to the type.
#pragma once

#include <stdexcept>

#include "gpstoken_native.h"
#include "half_types.h"

namespace gpstoken {

// Calls run(T{}) for the element type T that `dtype` names, and gives the C interface's result code.
template <class Run>
int run_for_dtype(int dtype, const Run& run) {
    try {
        switch (dtype) {
            case GPSTOKEN_FLOAT32:
                run(float{});
                return GPSTOKEN_OK;
            case GPSTOKEN_FLOAT16:
                run(Float16{});
                return GPSTOKEN_OK;
            case GPSTOKEN_BFLOAT16:
                run(BFloat16{});
                return GPSTOKEN_OK;
            default:
                return GPSTOKEN_UNSUPPORTED_DTYPE;
        }
    } catch (const std::exception&) {  // bad_alloc, length_error
        return GPSTOKEN_OUT_OF_MEMORY;
    }
}

}  // namespace gpstoken
