/* cuDNN: its backend of descriptors, through which convolutions and attention go, and the older calls.
 *
 * For every graph of operations it offers two engines: one that multiplies on tensor cores and says so, and one that
 * does without. A descriptor keeps what is set and gives it back. The other calls of cuDNN that the provider may make
 * are generated (build.py).
 */
#include "stub.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, BAD_PARAM = 2000, NOT_SUPPORTED = 3000, ALLOC_FAILED = 4001 };

/* Of cuDNN's enumerations, what is answered here. */
enum { PLAN = 5, CONVOLUTION = 10 };
enum {
    HEURISTICS_GRAPH = 201,
    HEURISTICS_RESULTS = 202,
    CONFIG_ENGINE = 300,
    CONFIG_KNOBS = 302,
    CONFIG_WORKSPACE = 303,
    CONFIG_SHARED_MEMORY = 304,
    PLAN_CONFIG = 401,
    PLAN_WORKSPACE = 402,
    GRAPH_OPERATIONS = 801,
    GRAPH_ENGINES = 802,
    ENGINE_INDEX = 1301,
    ENGINE_KNOBS = 1302,
    ENGINE_NUMERICAL_NOTES = 1303,
    ENGINE_BEHAVIOUR_NOTES = 1305,
};
enum { TYPE_DESCRIPTOR = 15 };
enum { NOTE_TENSOR_CORES = 0 };
static const char *const EXECUTED[] = {"cuDNN on tensor cores", "cuDNN without tensor cores"};
static const char *const ATTENTION = "cuDNN attention"; /* what convolves nothing: the provider has no third kind */
enum { ENGINES = 2 };

struct handle {
    struct stub_stream *stream;
};

struct attribute {
    struct attribute *next;
    int name, type;
    int64_t count;
    char values[];
};

struct descriptor {
    int type;
    int engine; /* of a configuration, an engine or a plan: which of the two */
    int convolves; /* likewise: whether some operation is a convolution */
    struct attribute *attributes;
};

static size_t size_of(int type) {
    switch (type) {
    case 0: case 3: case 5: case 6: case TYPE_DESCRIPTOR: return 8; /* handle, int64, double, pointer, descriptor */
    case 26: return 16;                                             /* fraction of two int64 */
    case 2: case 24: return 1;                                      /* boolean, character */
    default: return 4;                                              /* enumerations, float, int32 */
    }
}

size_t cudnnGetVersion(void) { return 91400; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { return status ? "CUDNN_STATUS_NOT_SUPPORTED" : "CUDNN_STATUS_SUCCESS"; }
void cudnnGetLastErrorString(char *into, size_t room) {
    if (room) into[0] = 0;
}

int cudnnCreate(struct handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return *handle ? OK : ALLOC_FAILED;
}
int cudnnDestroy(struct handle *handle) { return free(handle), OK; }
int cudnnSetStream(struct handle *handle, struct stub_stream *stream) { return handle->stream = stream, OK; }
int cudnnGetStream(struct handle *handle, struct stub_stream **stream) { return *stream = handle->stream, OK; }

int stub_dnn_launch(void *handle, const char *name) {
    return stub_launch(((struct handle *)handle)->stream, name) ? NOT_SUPPORTED : OK;
}

/* --- the backend ------------------------------------------------------------------------------- */

int cudnnBackendCreateDescriptor(int type, struct descriptor **into) {
    *into = calloc(1, sizeof **into);
    if (!*into) return ALLOC_FAILED;
    (*into)->type = type;
    return OK;
}

int cudnnBackendDestroyDescriptor(struct descriptor *descriptor) {
    for (struct attribute *each = descriptor->attributes, *next; each; each = next) next = each->next, free(each);
    free(descriptor);
    return OK;
}

int cudnnBackendSetAttribute(struct descriptor *descriptor, int name, int type, int64_t count, const void *values) {
    size_t bytes = (size_t)count * size_of(type);
    struct attribute *attribute = malloc(sizeof *attribute + bytes);
    if (!attribute) return ALLOC_FAILED;
    *attribute = (struct attribute){descriptor->attributes, name, type, count};
    if (bytes) memcpy(attribute->values, values, bytes);
    descriptor->attributes = attribute; /* the last one set is found first */
    return OK;
}

static const struct attribute *set(const struct descriptor *descriptor, int name) {
    const struct attribute *each = descriptor->attributes;
    while (each && each->name != name) each = each->next;
    return each;
}

/* Whether a descriptor of heuristics was asked about a graph with a convolution. */
static int convolves(const struct descriptor *heuristics) {
    const struct attribute *graph = set(heuristics, HEURISTICS_GRAPH);
    const struct attribute *all = graph ? set(*(struct descriptor *const *)graph->values, GRAPH_OPERATIONS) : NULL;
    for (int64_t i = 0; all && i < all->count; i++)
        if (((struct descriptor *const *)all->values)[i]->type == CONVOLUTION) return 1;
    return 0;
}

static const char *executed(const struct descriptor *plan) {
    return plan->convolves ? EXECUTED[plan->engine] : ATTENTION;
}

int cudnnBackendFinalize(struct descriptor *descriptor) {
    const struct attribute *config = descriptor->type == PLAN ? set(descriptor, PLAN_CONFIG) : NULL;
    if (config) {
        descriptor->engine = (*(struct descriptor **)config->values)->engine;
        descriptor->convolves = (*(struct descriptor **)config->values)->convolves;
        stub_note((struct stub_event){.kind = STUB_TRIED, .name = executed(descriptor)});
    }
    return OK;
}

static int give_number(int type, int64_t number, int64_t asked, int64_t *count, void *into) {
    if (count) *count = 1;
    if (asked > 0 && into) memcpy(into, &number, size_of(type));
    return OK;
}

int cudnnBackendGetAttribute(struct descriptor *descriptor, int name, int type, int64_t asked, int64_t *count,
                             void *into) {
    switch (name) {
    case HEURISTICS_RESULTS: /* descriptors of configurations, made by the caller, to fill in */
        for (int i = 0; into && i < ENGINES && i < asked; i++) {
            ((struct descriptor **)into)[i]->engine = i;
            ((struct descriptor **)into)[i]->convolves = convolves(descriptor);
        }
        if (count) *count = ENGINES;
        return OK;
    case CONFIG_ENGINE: /* likewise */
        if (into && asked > 0) (*(struct descriptor **)into)->engine = descriptor->engine;
        if (count) *count = 1;
        return OK;
    case CONFIG_WORKSPACE: case CONFIG_SHARED_MEMORY: case PLAN_WORKSPACE:
        return give_number(type, 0, asked, count, into);
    case ENGINE_INDEX: return give_number(type, descriptor->engine, asked, count, into);
    case GRAPH_ENGINES: return give_number(type, ENGINES, asked, count, into);
    case ENGINE_NUMERICAL_NOTES:
        if (!descriptor->engine) return give_number(type, NOTE_TENSOR_CORES, asked, count, into);
        if (count) *count = 0;
        return OK;
    case CONFIG_KNOBS: case ENGINE_KNOBS: case ENGINE_BEHAVIOUR_NOTES:
        if (count) *count = 0;
        return OK;
    default: break;
    }
    const struct attribute *own = set(descriptor, name);
    if (own) {
        int64_t fits = own->count < asked ? own->count : asked;
        if (count) *count = own->count;
        if (fits > 0 && into) memcpy(into, own->values, (size_t)fits * size_of(type));
        return OK;
    }
    return stub_refuse_number("cuDNN's attribute", name, NOT_SUPPORTED);
}

int cudnnBackendExecute(void *handle, struct descriptor *plan, struct descriptor *pack) {
    if (!plan || !pack) return BAD_PARAM;
    return stub_dnn_launch(handle, executed(plan));
}

/* --- older calls ------------------------------------------------------------------------------- */

int cudnnGetReductionWorkspaceSize(void *handle, void *reduction, void *from, void *to, size_t *bytes) {
    (void)handle, (void)reduction, (void)from, (void)to;
    return *bytes = 0, OK;
}

int cudnnGetReductionIndicesSize(void *handle, void *reduction, void *from, void *to, size_t *bytes) {
    return cudnnGetReductionWorkspaceSize(handle, reduction, from, to, bytes);
}
