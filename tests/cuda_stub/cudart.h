/* What the parts of the CUDA runtime share. */
#pragma once

#include "stub.h"

#define MEMORY_BYTES ((size_t)80 << 30)

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_IMPLICIT = 906,
};

/* `error`, which cudaGetLastError then gives to this thread. */
int stub_error(int error);
