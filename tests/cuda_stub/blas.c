/* cuBLAS and cuBLASLt: handles, and products that are lines in the log.
 *
 * Every other product of cuBLAS is generated (build.py): it takes its handle first and is one line.
 */
#include "stub.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, ALLOC_FAILED = 3 };

struct handle {
    struct stub_stream *stream;
    int math_mode;
};

static int create(void **into, size_t bytes) {
    *into = calloc(1, bytes);
    return *into ? OK : ALLOC_FAILED;
}

int cublasCreate_v2(void **handle) { return create(handle, sizeof(struct handle)); }

int cublasDestroy_v2(void *handle) { return free(handle), OK; }

int cublasSetStream_v2(struct handle *handle, struct stub_stream *stream) { return handle->stream = stream, OK; }
int cublasSetMathMode(struct handle *handle, int mode) { return handle->math_mode = mode, OK; }
int cublasGetMathMode(struct handle *handle, int *mode) { return *mode = handle->math_mode, OK; }

const char *cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return cublasGetStatusName(status); }

int stub_blas_launch(void *handle, const char *name) { return stub_launch(((struct handle *)handle)->stream, name); }

/* Descriptors keep nothing: nobody asks them back. */
int cublasLtCreate(void **handle) { return create(handle, 8); }
int cublasLtDestroy(void *handle) { return free(handle), OK; }
int cublasLtMatmulDescCreate(void **description) { return create(description, 8); }
int cublasLtMatmulDescDestroy(void *description) { return free(description), OK; }
int cublasLtMatmulDescSetAttribute(void *description) { return (void)description, OK; }
int cublasLtMatmulPreferenceCreate(void **preference) { return create(preference, 8); }
int cublasLtMatmulPreferenceDestroy(void *preference) { return free(preference), OK; }
int cublasLtMatmulPreferenceSetAttribute(void *preference) { return (void)preference, OK; }
int cublasLtMatrixLayoutCreate(void **layout) { return create(layout, 8); }
int cublasLtMatrixLayoutDestroy(void *layout) { return free(layout), OK; }
int cublasLtMatrixLayoutSetAttribute(void *layout) { return (void)layout, OK; }
int cublasLtMatrixTransformDescCreate(void **description) { return create(description, 8); }
int cublasLtMatrixTransformDescDestroy(void *description) { return free(description), OK; }

/* One way to multiply, which needs no workspace. A result: 64 bytes of algorithm, size_t workspace, state, waves. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                   void *preference, int asked, void *results, int *given) {
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *given = asked > 0;
    if (asked > 0) memset(results, 0, 96);
    return OK;
}

int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t workspace_bytes, struct stub_stream *stream) {
    (void)handle, (void)description, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout, (void)beta, (void)c;
    (void)c_layout, (void)d, (void)d_layout, (void)algorithm, (void)workspace, (void)workspace_bytes;
    return stub_launch(stream, "cublasLtMatmul");
}
