/* The CUDA runtime: errors, streams, captures and memory. */
#include "cudart.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 512

/* --- errors ------------------------------------------------------------------------------------ */

static __thread int last_error;

int stub_error(int error) {
    if (error) last_error = error;
    return error;
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = OK;
    return error;
}

int cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorString(int error) {
    switch (error) {
    case OK: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_DEVICE: return "invalid device ordinal";
    case NOT_SUPPORTED: return "operation not supported";
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_UNMATCHED: return "the capture was not initiated in this stream";
    case CAPTURE_IMPLICIT: return "operation would make the legacy stream depend on a capturing blocking stream";
    default: return "unknown error";
    }
}

const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

/* --- streams and captures ---------------------------------------------------------------------- */

struct graph {
    struct stub_event *nodes;
    size_t count, room;
};

struct stub_stream {
    struct graph *capture; /* what is being captured, or nothing */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stub_stream *capturing; /* one at a time, in global mode: then it binds every thread */
static int mode, invalid;

/* Notes what must not be done while a stream is captured in global mode, by any thread, and ends the capture. */
static int unsafe(const char *name) {
    if (!capturing || mode) return OK;
    invalid = 1;
    stub_note((struct stub_event){.kind = STUB_BROKEN, .name = name});
    return stub_error(CAPTURE_UNSUPPORTED);
}

static int waits(const char *name) {
    int error = unsafe(name);
    if (!error) stub_note((struct stub_event){.kind = STUB_WAIT, .name = name});
    return error;
}

static void happen(const struct stub_event *event) {
    if (event->kind == STUB_COPY) memmove((void *)event->address, (void *)event->source, event->bytes);
    if (event->kind == STUB_SET) memset((void *)event->address, (int)event->source, event->bytes);
}

int stub_queue(struct stub_stream *stream, struct stub_event event) {
    struct graph *graph = stream ? stream->capture : NULL;
    if (!stream && capturing && !mode) {
        unsafe(event.name);
        return stub_error(CAPTURE_IMPLICIT);
    }
    event.captured = graph != NULL;
    if (graph) {
        if (invalid) return stub_error(CAPTURE_INVALIDATED);
        pthread_mutex_lock(&lock);
        if (graph->count == graph->room) {
            graph->room = graph->room ? 2 * graph->room : 256;
            graph->nodes = realloc(graph->nodes, graph->room * sizeof *graph->nodes);
            if (!graph->nodes) abort();
        }
        graph->nodes[graph->count++] = event;
        pthread_mutex_unlock(&lock);
    } else {
        happen(&event);
    }
    stub_note(event);
    return OK;
}

int stub_launch(struct stub_stream *stream, const char *name) {
    return stub_queue(stream, (struct stub_event){.kind = STUB_LAUNCH, .name = name});
}

int cudaStreamCreateWithFlags(struct stub_stream **stream, unsigned flags) {
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    return *stream ? OK : stub_error(OUT_OF_MEMORY);
}

int cudaStreamCreate(struct stub_stream **stream) { return cudaStreamCreateWithFlags(stream, 0); }

int cudaStreamDestroy(struct stub_stream *stream) {
    free(stream);
    return OK;
}

int cudaStreamSynchronize(struct stub_stream *stream) {
    (void)stream;
    return waits("cudaStreamSynchronize");
}

int cudaDeviceSynchronize(void) { return waits("cudaDeviceSynchronize"); }

int cudaStreamBeginCapture(struct stub_stream *stream, int how) {
    if (!stream) return stub_error(CAPTURE_IMPLICIT);
    if (capturing) return unsafe("cudaStreamBeginCapture") ? last_error : stub_error(CAPTURE_UNSUPPORTED);
    stream->capture = calloc(1, sizeof *stream->capture);
    if (!stream->capture) return stub_error(OUT_OF_MEMORY);
    capturing = stream, mode = how, invalid = 0;
    stub_note((struct stub_event){.kind = STUB_CAPTURE, .name = "cudaStreamBeginCapture"});
    return OK;
}

int cudaStreamIsCapturing(struct stub_stream *stream, int *status) {
    *status = stream && stream->capture ? 1 + invalid : 0;
    return OK;
}

int cudaGraphDestroy(struct graph *graph) {
    free(graph->nodes);
    free(graph);
    return OK;
}

int cudaStreamEndCapture(struct stub_stream *stream, struct graph **graph) {
    *graph = NULL;
    if (!stream || stream != capturing) return stub_error(CAPTURE_UNMATCHED);
    struct graph *captured = stream->capture;
    stream->capture = NULL, capturing = NULL;
    if (invalid) {
        cudaGraphDestroy(captured);
        return stub_error(CAPTURE_INVALIDATED);
    }
    *graph = captured;
    stub_note((struct stub_event){
        STUB_CAPTURED, 0, "cudaStreamEndCapture", (uintptr_t)captured, 0, captured->count, 0});
    return OK;
}

/* An instance is a graph of its own, and its address is what the log calls it by. */
int cudaGraphInstantiate(struct graph **instance, const struct graph *graph, unsigned long long flags) {
    (void)flags;
    struct graph *copy = malloc(sizeof *copy);
    size_t bytes = graph->count * sizeof *graph->nodes;
    if (!copy || !(copy->nodes = malloc(bytes + 1))) return stub_error(OUT_OF_MEMORY);
    memcpy(copy->nodes, graph->nodes, bytes);
    copy->count = copy->room = graph->count;
    *instance = copy;
    return OK;
}

int cudaGraphExecDestroy(struct graph *instance) {
    stub_note((struct stub_event){STUB_RELEASE, 0, "cudaGraphExecDestroy", (uintptr_t)instance, 0, instance->count, 0});
    return cudaGraphDestroy(instance);
}

int cudaGraphLaunch(struct graph *instance, struct stub_stream *stream) {
    if (stream && stream->capture) return stub_refuse("cudaGraphLaunch on a stream that is captured", NOT_SUPPORTED);
    for (size_t i = 0; i < instance->count; i++) happen(&instance->nodes[i]);
    stub_note((struct stub_event){STUB_REPLAY, 0, "cudaGraphLaunch", (uintptr_t)instance, 0, instance->count, 0});
    return OK;
}

/* Work happens at once, so an event has happened when it is recorded, and streams wait for nothing. */
int cudaEventCreateWithFlags(void **event, unsigned flags) {
    (void)flags;
    *event = malloc(1);
    return *event ? OK : stub_error(OUT_OF_MEMORY);
}

int cudaEventCreate(void **event) { return cudaEventCreateWithFlags(event, 0); }

int cudaEventDestroy(void *event) {
    free(event);
    return OK;
}

int cudaEventRecord(void *event, void *stream) { return (void)event, (void)stream, OK; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) {
    return (void)event, (void)stream, (void)flags, OK;
}
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
    return (void)stream, (void)event, (void)flags, OK;
}
int cudaEventSynchronize(void *event) {
    (void)event;
    return waits("cudaEventSynchronize");
}

int cudaEventElapsedTime(float *ms, void *start, void *end) {
    (void)start, (void)end;
    *ms = 0;
    return OK;
}

int cudaLaunchHostFunc(struct stub_stream *stream, void (*work)(void *), void *data) {
    int error = stub_launch(stream, "cudaLaunchHostFunc");
    if (!error && !(stream && stream->capture)) work(data);
    return error;
}

/* --- memory ------------------------------------------------------------------------------------ */

static struct block {
    uintptr_t begin, end;
    int type; /* CUDA's: 1 pinned on the host, 2 on the device */
} *blocks;
static size_t block_count, block_room, allocated_bytes;

static int type_of(const void *address, struct block *found) {
    int type = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < block_count && !type; i++) {
        if (blocks[i].begin <= (uintptr_t)address && (uintptr_t)address < blocks[i].end) {
            type = blocks[i].type;
            if (found) *found = blocks[i];
        }
    }
    pthread_mutex_unlock(&lock);
    return type;
}

static int allocate(void **address, size_t bytes, int type, const char *name) {
    int error = unsafe(name);
    if (error) return error;
    *address = NULL;
    if (bytes == 0) return OK;
    if (bytes > MEMORY_BYTES - allocated_bytes) return stub_error(OUT_OF_MEMORY);
    if (posix_memalign(address, ALIGNMENT, bytes)) return stub_error(OUT_OF_MEMORY);
    memset(*address, 0, bytes);
    pthread_mutex_lock(&lock);
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 256;
        blocks = realloc(blocks, block_room * sizeof *blocks);
        if (!blocks) abort();
    }
    blocks[block_count++] = (struct block){(uintptr_t)*address, (uintptr_t)*address + bytes, type};
    allocated_bytes += bytes;
    pthread_mutex_unlock(&lock);
    stub_note((struct stub_event){type == 2 ? STUB_ALLOCATE : STUB_PIN, 0, name, (uintptr_t)*address, 0, bytes, 0});
    return OK;
}

static int release(void *address, const char *name) {
    int error = unsafe(name);
    size_t bytes = 0;
    if (error || !address) return error;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < block_count; i++) {
        if (blocks[i].begin == (uintptr_t)address) {
            bytes = blocks[i].end - blocks[i].begin;
            blocks[i] = blocks[--block_count];
            break;
        }
    }
    allocated_bytes -= bytes;
    pthread_mutex_unlock(&lock);
    if (!bytes) return stub_error(INVALID_VALUE);
    stub_note((struct stub_event){STUB_FREE, 0, name, (uintptr_t)address, 0, bytes, 0});
    free(address);
    return OK;
}

int cudaMalloc(void **address, size_t bytes) { return allocate(address, bytes, 2, "cudaMalloc"); }
int cudaMallocHost(void **address, size_t bytes) { return allocate(address, bytes, 1, "cudaMallocHost"); }
int cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    return allocate(address, bytes, 1, "cudaHostAlloc");
}
int cudaFree(void *address) { return release(address, "cudaFree"); }
int cudaFreeHost(void *address) { return release(address, "cudaFreeHost"); }

int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = MEMORY_BYTES;
    *free_bytes = MEMORY_BYTES - allocated_bytes;
    return OK;
}

int cudaPointerGetAttributes(void *attributes, const void *address) {
    struct { int type, device; void *device_pointer, *host_pointer; } *into = attributes;
    into->type = type_of(address, NULL);
    into->device = into->type ? 0 : -2;
    into->device_pointer = into->type ? (void *)address : NULL;
    into->host_pointer = into->type == 1 ? (void *)address : NULL;
    return OK;
}

static struct stub_event copying(void *to, const void *from, size_t bytes, const char *name) {
    int across = (type_of(to, NULL) == 2) != (type_of(from, NULL) == 2); /* now: addresses are used again */
    return (struct stub_event){STUB_COPY, 0, name, (uintptr_t)to, (uintptr_t)from, bytes, across};
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, struct stub_stream *stream) {
    (void)kind;
    return bytes ? stub_queue(stream, copying(to, from, bytes, "cudaMemcpyAsync")) : OK;
}

/* Whoever asks waits for it, but within the device: see CUDA's notes on synchronous functions. */
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    (void)kind;
    int error = unsafe("cudaMemcpy");
    if (error || !bytes) return error;
    return stub_queue(NULL, copying(to, from, bytes, "cudaMemcpy"));
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, struct stub_stream *stream) {
    (void)kind;
    int error = OK;
    for (size_t row = 0; row < height && !error; row++)
        error = stub_queue(stream, copying((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width,
                                           "cudaMemcpy2DAsync"));
    return error;
}

int cudaMemsetAsync(void *address, int value, size_t bytes, struct stub_stream *stream) {
    struct stub_event event = {STUB_SET, 0, "cudaMemset", (uintptr_t)address, (uintptr_t)value, bytes, 0};
    return bytes ? stub_queue(stream, event) : OK;
}

int cudaMemset(void *address, int value, size_t bytes) {
    int error = unsafe("cudaMemset");
    return error ? error : cudaMemsetAsync(address, value, bytes, NULL);
}

/* What `memory` the tests ask about: CUDA's type of an address (0 unknown, 1 pinned, 2 device), and its block. */
int stub_memory(const void *address, uint64_t *begin, uint64_t *end) {
    struct block block = {0};
    int type = type_of(address, &block);
    *begin = block.begin, *end = block.end;
    return type;
}
