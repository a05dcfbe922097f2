/* What the parts of the stub share: one log of all that was asked of the "GPU", and what a stream is.
 *
 * Every library that ONNX Runtime's CUDA provider asks for is this one shared object under another name. It computes
 * nothing. Device memory is host memory, so copies are real; kernels, products and convolutions are lines in the log.
 * Arguments have the sizes and places that CUDA's documentation gives them; handles and descriptors are void pointers.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum stub_kind {
    STUB_LAUNCH,    /* a kernel, or a call of a library that would launch some; `name` */
    STUB_COPY,      /* `bytes` from `source` to `address` */
    STUB_SET,       /* `bytes` at `address` are set */
    STUB_ALLOCATE,  /* `bytes` of device memory at `address`; pinned host memory is STUB_PIN */
    STUB_PIN,
    STUB_FREE,      /* of either */
    STUB_WAIT,      /* the host waits for the device: `name` */
    STUB_CAPTURE,   /* a capture begins */
    STUB_CAPTURED,  /* it ends; `address` is the graph, `bytes` the number of its nodes */
    STUB_REPLAY,    /* a graph is launched; `address` and `bytes` as above */
    STUB_RELEASE,   /* an instance of a graph is destroyed; `address` and `bytes` as above */
    STUB_BROKEN,    /* what CUDA forbids while a stream is captured: `name` */
    STUB_REFUSED,   /* the stub has no answer: `name` */
    STUB_TRIED,     /* a plan of cuDNN's was made: `name` */
};

struct stub_event {
    int32_t kind;
    int32_t captured;  /* 1 where it became a node of a graph and did not happen */
    const char *name;
    uint64_t address, source, bytes;
    int32_t across;    /* 1 for a copy between the device and the host */
};

struct stub_stream;

/* Something on a stream: it becomes a node while the stream is captured, and otherwise happens. A cudaError. */
int stub_queue(struct stub_stream *stream, struct stub_event event);
int stub_launch(struct stub_stream *stream, const char *name);

/* An event in the log, whatever is captured. */
void stub_note(struct stub_event event);

/* Says once on standard error, and each time in the log, that `name` is not answered; gives `error`. */
int stub_refuse(const char *name, int error);
int stub_refuse_number(const char *name, int number, int error);
