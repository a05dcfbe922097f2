/* The CUDA runtime: kernels, which are lines in the log, and what it says of the one GPU that there is. */
#include "cudart.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3;

/* --- kernels ----------------------------------------------------------------------------------- */

/* The kernels' names, by the address of the function that the host calls them by. */
static struct kernel {
    const void *function;
    const char *name;
} *kernels;
static size_t kernel_count, kernel_room;

static struct kernel *place_of(struct kernel *table, size_t room, const void *function) {
    size_t at = ((uintptr_t)function >> 4) * 0x9E3779B97F4A7C15u % room;
    while (table[at].function && table[at].function != function) at = (at + 1) % room;
    return &table[at];
}

void **__cudaRegisterFatBinary(void *binary) { return binary; }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterVar(void **handle) { (void)handle; }

void __cudaRegisterFunction(void **handle, const void *function, char *device_function, const char *name) {
    (void)handle, (void)device_function;
    if (2 * kernel_count >= kernel_room) {
        size_t room = kernel_room ? 2 * kernel_room : 1 << 15;
        struct kernel *table = calloc(room, sizeof *table);
        if (!table) abort();
        for (size_t i = 0; i < kernel_room; i++)
            if (kernels[i].function) *place_of(table, room, kernels[i].function) = kernels[i];
        free(kernels);
        kernels = table, kernel_room = room;
    }
    struct kernel *place = place_of(kernels, kernel_room, function);
    kernel_count += !place->function;
    *place = (struct kernel){function, name};
}

static int launch(const void *function, struct stub_stream *stream) {
    struct kernel *kernel = kernel_room ? place_of(kernels, kernel_room, function) : NULL;
    if (!kernel || !kernel->function) return stub_refuse("a kernel that was not registered", NOT_SUPPORTED);
    return stub_launch(stream, kernel->name);
}

static __thread struct { dim3 grid, block; size_t shared_bytes; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
    configuration.grid = grid, configuration.block = block;
    configuration.shared_bytes = shared_bytes, configuration.stream = stream;
    return 0;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void **stream) {
    *grid = configuration.grid, *block = configuration.block;
    *shared_bytes = configuration.shared_bytes, *stream = configuration.stream;
    return OK;
}

int __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return OK;
}

int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                     struct stub_stream *stream) {
    (void)grid, (void)block, (void)arguments, (void)shared_bytes;
    return launch(function, stream);
}

int __cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                       struct stub_stream *stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream);
}

int cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                                struct stub_stream *stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream);
}

int cudaLaunchKernelExC(const void *launch_configuration, const void *function, void **arguments) {
    const struct { dim3 grid, block; size_t shared_bytes; struct stub_stream *stream; } *asked = launch_configuration;
    (void)arguments;
    return launch(function, asked->stream);
}

int cudaFuncGetAttributes(void *attributes, const void *function) {
    (void)function;
    struct {
        size_t shared_bytes, constant_bytes, local_bytes;
        int most_threads, registers, ptx_version, binary_version, cache_mode, most_dynamic_shared_bytes;
    } *into = attributes;
    memset(into, 0, sizeof *into);
    into->most_threads = 1024, into->registers = 32;
    into->ptx_version = into->binary_version = 90;
    into->most_dynamic_shared_bytes = 48 << 10;
    return OK;
}

int cudaFuncSetAttribute(const void *function, int attribute, int value) {
    return (void)function, (void)attribute, (void)value, OK;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_there, const void *function, int threads,
                                                           size_t shared_bytes, unsigned flags) {
    (void)function, (void)shared_bytes, (void)flags;
    *blocks_there = threads > 0 && threads <= 1024 ? 2048 / threads : 1;
    return OK;
}

/* --- the GPU ----------------------------------------------------------------------------------- */

int cudaGetDeviceCount(int *count) { return *count = 1, OK; }
int cudaGetDevice(int *device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return device ? stub_error(INVALID_DEVICE) : OK; }
int cudaDriverGetVersion(int *version) { return *version = 13000, OK; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, OK; }

/* The numbers of an H100 (SXM), by CUDA's number of the attribute. */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    static const int values[][2] = {
        {1, 1024},        {2, 1024},   {3, 1024},  {4, 64},     {5, 2147483647}, {6, 65535}, {7, 65535},
        {8, 48 << 10},    {9, 64 << 10}, {10, 32}, {12, 65536}, {16, 132},       {18, 0},    {38, 50 << 20},
        {39, 2048},       {41, 1},     {75, 9},    {76, 0},     {81, 228 << 10}, {82, 65536}, {83, 1},
        {88, 0},          {89, 1},     {95, 1},    {97, 227 << 10}, {106, 32},   {115, 1},   {120, 1},
    };
    if (device) return stub_error(INVALID_DEVICE);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i][0] == attribute) return *value = values[i][1], OK;
    return stub_refuse_number("cudaDeviceGetAttribute", attribute, NOT_SUPPORTED);
}

/* The beginning of CUDA 13's cudaDeviceProp; the rest of its 1008 bytes is zero but where `later` says otherwise. */
int cudaGetDeviceProperties(void *properties, int device) {
    struct {
        char name[256], identity[16], luid[8];
        unsigned luid_mask;
        size_t memory_bytes, shared_bytes;
        int registers, warp;
        size_t pitch;
        int threads, block[3], grid[3];
        size_t constant_bytes;
        int major, minor;
        size_t texture_alignment, texture_pitch_alignment;
        int processors;
    } *into = properties;
    /* Offsets within the struct, in bytes, of four-byte numbers. */
    static const int later[][2] = {
        {560, 1},    /* concurrent kernels */
        {584, 3},    /* engines that copy */
        {588, 1},    /* one space of addresses */
        {596, 50 << 20}, /* L2 */
        {604, 2048}, /* threads of a processor */
        {624, 228 << 10}, /* shared memory of a processor */
        {632, 65536}, /* registers of a processor */
        {636, 1}, {656, 1}, /* managed memory */
        {668, 1},    /* cooperative launches */
        {672, 227 << 10}, /* shared memory of a block that asks for more */
        {688, 32},   /* blocks of a processor */
        {696, 1 << 10}, /* shared memory that the system takes of a block */
        {720, 1},    /* pools of memory */
        {748, 1},    /* clusters */
    };
    if (device) return stub_error(INVALID_DEVICE);
    memset(properties, 0, 1008);
    strcpy(into->name, "a stub of an H100, which computes nothing");
    into->memory_bytes = MEMORY_BYTES, into->shared_bytes = 48 << 10;
    into->registers = 65536, into->warp = 32, into->threads = 1024;
    into->block[0] = into->block[1] = 1024, into->block[2] = 64;
    into->grid[0] = 2147483647, into->grid[1] = into->grid[2] = 65535;
    into->constant_bytes = 64 << 10;
    into->major = 9, into->minor = 0;
    into->texture_alignment = 512, into->texture_pitch_alignment = 32;
    into->processors = 132;
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        memcpy((char *)properties + later[i][0], &later[i][1], 4);
    return OK;
}

/* Functions of the driver: those of the stub, which has next to none. */
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (status) *status = *function ? 0 : 1;
    return OK;
}
