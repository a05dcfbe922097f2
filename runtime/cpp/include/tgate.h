/*
 * libtgate: a bundle runs inside a serving process, with no Python.
 *
 * A bundle is opened and checked, a session loads its graphs on an engine, and each request draws one prompt's images:
 *
 *     tgate_error *error = NULL;
 *     tgate_bundle *bundle = NULL;
 *     tgate_session *session = NULL;
 *     tgate_request *request = NULL;
 *     uint8_t *picture = NULL;
 *
 *     tgate_session_options options;
 *     tgate_session_options_init(&options, sizeof options);
 *     options.threads = 4;
 *
 *     tgate_request_options ask;
 *     tgate_request_options_init(&ask, sizeof ask);
 *     ask.prompt = "a green star above a red disk";
 *     ask.seed = 7;
 *
 *     if (tgate_bundle_open("bundles/mini", NULL, &bundle, &error) ||
 *         tgate_session_open(bundle, &options, &session, &error) ||
 *         tgate_request_create(session, &ask, &request, &error) ||
 *         tgate_request_run(request, &error)) {
 *       fprintf(stderr, "%s\n", tgate_error_text(error));
 *     } else {
 *       tgate_picture_facts facts;
 *       tgate_picture_facts_init(&facts, sizeof facts);
 *       tgate_request_picture_facts(request, &facts, NULL);      // width, height, frames, bytes
 *       picture = malloc(facts.bytes);                           // RGB, one byte a colour, rows from the top
 *       if (tgate_request_decode(request, 0, picture, facts.bytes, &error) == TGATE_OK)
 *         save(picture, facts.width, facts.height);
 *     }
 *     free(picture);
 *     tgate_error_free(error);
 *     tgate_request_free(request);
 *     tgate_session_free(session);
 *     tgate_bundle_free(bundle);
 *
 * Errors. What can fail returns a tgate_code, TGATE_OK being 0, and where its last argument is not NULL puts an error
 * there: free it with tgate_error_free; one that was there before is not freed. A call that failed left its other
 * outputs as they were.
 *
 * Structs begin with their size. Each has an init function, which is given the size that the caller was compiled with
 * and fills in the defaults; a later library that knows more fields takes the shorter struct of an older caller, and
 * refuses one that is longer than it knows.
 *
 * Ownership. Everything is freed by the library that made it; NULL may be freed. Strings and arrays that a caller gives
 * are read until the call returns. Buffers that results are written to are the caller's. A bundle may be freed while
 * sessions of it are open, a session while it has requests: what they need stays until they are freed.
 *
 * Threads. A bundle and a session may be used by any number of threads at once. A request belongs to one thread at a
 * time, and a pool with all of its requests to one thread at a time, decoding and freeing among it; only
 * tgate_request_cancel may be called by any, while the request is there. Requests of different pools run at once, and no
 * call takes a lock while an engine runs; but all calls of a process that go to a GPU (ort-cuda) take turns, and with
 * cuda_graphs a request is stepped in the thread that made it. The library starts no threads of its own, but to check digests and
 * to add adapters to weights, which end with the call; the engine has a pool for each loaded graph.
 *
 * Signals, locale and standard streams are left alone, and no exception leaves the library.
 */
#ifndef TGATE_H
#define TGATE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TGATE_API __attribute__((visibility("default")))
#else
#define TGATE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* --- versions and errors ------------------------------------------------------------------------------------- */

#define TGATE_VERSION_MAJOR 0
#define TGATE_VERSION_MINOR 1
#define TGATE_VERSION_PATCH 0

/* The library that is loaded, "0.1.0". What a program was compiled against is in the macros above: while the first
 * number is 0, the second one counts for both. */
TGATE_API const char *tgate_version(void);

typedef enum tgate_code {
  TGATE_OK = 0,
  TGATE_ARGUMENT = 1,  /* NULL, a wrong struct size, a buffer that is too small: a fault of the calling program */
  TGATE_BUNDLE = 2,    /* files are missing, damaged, not to be trusted, or of another version */
  TGATE_PLAN = 3,      /* a plan cannot run on its bundle's graphs */
  TGATE_ENGINE = 4,    /* the engine cannot be loaded, or a graph failed */
  TGATE_REQUEST = 5,   /* a request that cannot be served as asked */
  TGATE_MEMORY = 6,    /* there is not so much memory */
  TGATE_CANCELLED = 7, /* tgate_request_cancel, or a callback that said stop */
  TGATE_INTERNAL = 8   /* a fault of this library; please report it */
} tgate_code;

/* One line for people: what was got, what was wanted, what to do next. */
typedef struct tgate_error tgate_error;
TGATE_API tgate_code tgate_error_code(const tgate_error *error);
/* UTF-8; lives as long as the error. "" for NULL. */
TGATE_API const char *tgate_error_text(const tgate_error *error);
TGATE_API void tgate_error_free(tgate_error *error);

/* --- bundles ------------------------------------------------------------------------------------------------- */

/* A directory that `tgate-export` wrote, checked. */
typedef struct tgate_bundle tgate_bundle;

typedef struct tgate_bundle_options {
  size_t size;
  int32_t check_digests; /* 1: the SHA-256 of every file (default); 0: sizes alone, and of each graph when it is loaded */
} tgate_bundle_options;
TGATE_API tgate_code tgate_bundle_options_init(tgate_bundle_options *options, size_t size);

/* `options` NULL is the defaults. Every plan is checked against every shape's graphs. */
TGATE_API tgate_code tgate_bundle_open(const char *path, const tgate_bundle_options *options, tgate_bundle **bundle,
                                       tgate_error **error);
TGATE_API void tgate_bundle_free(tgate_bundle *bundle);

typedef struct tgate_bundle_facts {
  size_t size;
  const char *model;     /* these live as long as the bundle */
  const char *family;
  const char *licence;
  const char *dtype;     /* of the network: "float32", "float16" or "bfloat16" */
  size_t plans;          /* how many: tgate_bundle_plan */
  size_t sizes;          /* how many: tgate_bundle_size */
  size_t tokenizers;     /* 0: nothing is conditioned by text */
  int32_t frames;        /* of one result; 1 unless it is a video */
  int32_t fps;
  int32_t takes_prompt;  /* whether there is a text graph */
  int32_t takes_picture; /* whether there is an image graph */
  int32_t decodes;       /* whether there is a decoder */
  int32_t guided;        /* whether a negative prompt means anything */
} tgate_bundle_facts;
TGATE_API tgate_code tgate_bundle_facts_init(tgate_bundle_facts *facts, size_t size);
TGATE_API tgate_code tgate_bundle_facts_get(const tgate_bundle *bundle, tgate_bundle_facts *facts, tgate_error **error);
/* Names by their number; NULL where there is none. The first size is the default; plans are in the manifest's order. */
TGATE_API const char *tgate_bundle_plan(const tgate_bundle *bundle, size_t index);
TGATE_API const char *tgate_bundle_size(const tgate_bundle *bundle, size_t index);

/* The names of its adapters, in the order of the alphabet. */
TGATE_API const char *tgate_bundle_adapter(const tgate_bundle *bundle, size_t index);

/* One conditioning tensor of a bundle, for requests that bring their own. */
typedef struct tgate_tensor_facts {
  size_t size;
  const char *name; /* "<name>.negative" or "<name>.positive"; lives as long as the bundle */
  const char *dtype;
  size_t rank;       /* without the images' dimension */
  int64_t shape[8];
} tgate_tensor_facts;
TGATE_API tgate_code tgate_tensor_facts_init(tgate_tensor_facts *facts, size_t size);
/* The tensors that a request may bring at a size (NULL: the default), by their number. TGATE_ARGUMENT where there are no
 * more. Constants of the bundle are not among them. */
TGATE_API tgate_code tgate_bundle_tensor(const tgate_bundle *bundle, const char *image_size, size_t index,
                                         tgate_tensor_facts *facts, tgate_error **error);

/* What requests take, in bytes, before any of it is taken, on an engine that keeps one copy of the weights. */
typedef struct tgate_memory {
  size_t size;
  uint64_t weights; /* once for the session */
  uint64_t request; /* the buffers of a pool of so many images, carries among them */
  uint64_t scratch; /* what the hungriest graph holds while it runs: of the plan, of the text, of the decoder */
  uint64_t peak;    /* all of it; the engine's own code, and what it packs anew, are not in it */
} tgate_memory;
TGATE_API tgate_code tgate_memory_init(tgate_memory *memory, size_t size);
/* `plan` NULL is "default", `image_size` NULL the first size. */
TGATE_API tgate_code tgate_bundle_memory(const tgate_bundle *bundle, const char *plan, const char *image_size,
                                         size_t images, tgate_memory *memory, tgate_error **error);

/* --- sessions ------------------------------------------------------------------------------------------------ */

/* A bundle's graphs, loaded on an engine: the weights, once for all requests. */
typedef struct tgate_session tgate_session;

typedef struct tgate_session_options {
  size_t size;
  const char *engine;        /* "ort-cpu" (default) or "ort-cuda" */
  const char *library;       /* ONNX Runtime's, 1.31 or later; NULL: $TGATE_ONNXRUNTIME, or libonnxruntime.so.1 */
  const char *memory;        /* "fast": private copies in the layouts that the engine likes; "shared": one. NULL: "fast"
                              * on a CPU, "shared" on a GPU */
  const char *const *plans;  /* whose graphs are loaded: names, or files (.json) of `tgate plan --output`; NULL: all */
  size_t plan_count;
  const char *const *sizes;  /* the sizes that are loaded; NULL: all */
  size_t size_count;
  int32_t threads;           /* of one graph call, on a CPU; 0: the engine's choice */
  int32_t device;            /* of a GPU */
  void *stream;              /* ort-cuda: a cudaStream_t of the caller's, on which everything runs; NULL: its own */
  int32_t cuda_graphs;       /* ort-cuda: 1 captures each denoising call as a CUDA graph when it is bound, and replays it */
} tgate_session_options;
TGATE_API tgate_code tgate_session_options_init(tgate_session_options *options, size_t size);

/* `options` NULL is the defaults. The first session of a process loads the library; one of another library is refused
 * while that one is loaded. */
TGATE_API tgate_code tgate_session_open(const tgate_bundle *bundle, const tgate_session_options *options,
                                        tgate_session **session, tgate_error **error);
TGATE_API void tgate_session_free(tgate_session *session);

/* An adapter of the bundle (a LoRA that `tgate adapt` added), and what its changes are multiplied with: 0.5 to 1.5 are
 * usual, any number but 0 up to 10000 is taken. */
typedef struct tgate_adapter {
  const char *name;
  double scale;
} tgate_adapter;
/* A session of the same graphs, plans and sizes whose weights include `count` adapters, none of them twice. It holds
 * copies of the weights that they change, and shares everything else with `session`, of which nothing changes: requests
 * of the one are bit for bit what they are without the other. What it takes is the loading of those graphs, as long as
 * opening them did, on all cores for a moment; requests then cost what they cost without. Keep one for each combination
 * that is asked for often, and free it as any other; `session` may be freed before. */
TGATE_API tgate_code tgate_session_adapted(const tgate_session *session, const tgate_adapter *adapters, size_t count,
                                           tgate_session **adapted, tgate_error **error);
/* The engine's name and version, "ort-cpu 1.31.1"; lives as long as the session. */
TGATE_API const char *tgate_session_engine(const tgate_session *session);
/* One line for whoever runs the host, where the engine could do better with these graphs: "ort-cuda takes 2 of 6 graphs
 * as they were exported; ..."; empty where there is nothing to say. Lives as long as the session. */
TGATE_API const char *tgate_session_advice(const tgate_session *session);

/* --- pools --------------------------------------------------------------------------------------------------- */

/* Room for images of one size: the buffers of so many, allocated when it is made and bound once. Requests that are made
 * in one pool can be moved by one call (tgate_batch). A request that is made without one has a pool of its own. */
typedef struct tgate_pool tgate_pool;

typedef struct tgate_pool_options {
  size_t size;
  size_t images;            /* how many there is room for, 1 by default */
  const char *image_size;   /* such as "832x1216"; NULL: the session's first */
  const char *const *plans; /* what its requests may follow; NULL: "default" */
  size_t plan_count;
} tgate_pool_options;
TGATE_API tgate_code tgate_pool_options_init(tgate_pool_options *options, size_t size);
TGATE_API tgate_code tgate_pool_create(const tgate_session *session, const tgate_pool_options *options,
                                       tgate_pool **pool, tgate_error **error);
/* Requests of it that are still there keep what they need. */
TGATE_API void tgate_pool_free(tgate_pool *pool);
/* The bytes of its buffers; those of tgate_memory's `request`. */
TGATE_API uint64_t tgate_pool_bytes(const tgate_pool *pool);
/* How many more images there is room for. */
TGATE_API size_t tgate_pool_free_images(const tgate_pool *pool);
/* How many images were moved from one place to another until now, so that requests could share calls. */
TGATE_API uint64_t tgate_pool_moved_images(const tgate_pool *pool);

/* --- requests ------------------------------------------------------------------------------------------------ */

/* One prompt (or picture, or set of tensors) and its images, walking one plan. */
typedef struct tgate_request tgate_request;

/* Where a request is. */
typedef struct tgate_progress {
  size_t size;
  size_t done;       /* steps taken */
  size_t total;      /* steps of its plan */
  const char *graph; /* the next step's; NULL at the end. Requests of a pool can share a call where these are equal */
  const char *phase; /* the next step's, a word for people; NULL at the end. Both live as long as the request */
} tgate_progress;
TGATE_API tgate_code tgate_progress_init(tgate_progress *progress, size_t size);

/* Hears of every step, in the thread that takes it, after it. 0 goes on; anything else stops the request, whose run
 * then ends in TGATE_CANCELLED. The request may be looked at (latents, progress, a picture) and cancelled; it is not
 * stepped, begun anew or freed there, and nor is any other of its pool, and none is made in the pool. No exception of
 * C++ leaves it. */
typedef int32_t (*tgate_on_step)(tgate_request *request, const tgate_progress *progress, void *user_data);

/* Ids of one tokenizer, as its input of the text graph takes them: at most its length; cut and filled up by the caller or
 * filled up here with its padding. */
typedef struct tgate_ids {
  const int64_t *ids;
  size_t count;
} tgate_ids;

/* A conditioning tensor: float32, of the shape that tgate_bundle_tensor says, the same for all images of the request. */
typedef struct tgate_tensor {
  const char *name;
  const float *data;
  size_t count; /* elements */
} tgate_tensor;

typedef struct tgate_request_options {
  size_t size;
  tgate_pool *pool;            /* where it takes its room; NULL: a pool of its own */
  const char *plan;            /* a name, or a file that the session was opened with; NULL: "default", or the pool's only one */
  const char *image_size;      /* without a pool; NULL: the session's first */
  size_t images;               /* 1 by default; image j has the seed seed + j */
  uint64_t seed;               /* below 2^63 */
  const char *generator;       /* "numpy" (default) or "torch-cuda" */
  double guidance_scale;       /* 0 (default): the plan's */

  /* One of these four says what is drawn. */
  const char *prompt;
  const tgate_ids *ids;        /* one for each tokenizer */
  const tgate_tensor *tensors; /* all that tgate_bundle_tensor lists */
  const uint8_t *picture;      /* RGB, width x height of the image size, rows from the top */
  size_t id_count, tensor_count, picture_bytes;

  const char *negative_prompt;   /* beside a prompt; NULL: the model's convention for none */
  const tgate_ids *negative_ids; /* beside ids, as many; NULL likewise */

  const float *initial_latents; /* standard normal noise in place of the seeds', [images, ...]; NULL: the seeds' */
  size_t initial_latents_count; /* elements */

  tgate_on_step on_step; /* may be NULL */
  void *user_data;
} tgate_request_options;
TGATE_API tgate_code tgate_request_options_init(tgate_request_options *options, size_t size);

/* Everything is checked here, the prompt is encoded, and the room is taken: buffers of a pool of its own where none is
 * named. What was cut off a prompt that is too long is told by tgate_request_cut. */
TGATE_API tgate_code tgate_request_create(const tgate_session *session, const tgate_request_options *options,
                                          tgate_request **request, tgate_error **error);
TGATE_API void tgate_request_free(tgate_request *request);

/* Begin anew with other options: buffers, bindings and room stay. Pool, plan, image size and the number of images must be
 * those that it was made with, or be left at their defaults. */
TGATE_API tgate_code tgate_request_reset(tgate_request *request, const tgate_request_options *options,
                                         tgate_error **error);

/* Take one step; at the end of the plan, nothing. */
TGATE_API tgate_code tgate_request_step(tgate_request *request, tgate_error **error);
/* Take all steps that are left. */
TGATE_API tgate_code tgate_request_run(tgate_request *request, tgate_error **error);
/* Take one step of each of several requests of one pool, whose next steps run one graph, in as few calls of the engine
 * as the bundle's batches allow. Their plans, positions, seeds and guidance scales may differ. Images are moved in the
 * pool until those of a call are neighbours; who goes on together stays together. A request that was cancelled, whose
 * callback says stop, or that failed is left out alone: `stopped` (as many as requests; may be NULL) is 1 for it, and
 * tgate_request_step says why. TGATE_OK where all are left out. Where the engine fails, all of them have failed. */
TGATE_API tgate_code tgate_batch(tgate_request *const *requests, size_t count, int32_t *stopped, tgate_error **error);

/* From any thread: the step under way ends as soon as the engine can, and every later one fails, with TGATE_CANCELLED,
 * until the request is reset. A batch under way goes on for the others' sake; the next one leaves the request out. */
TGATE_API void tgate_request_cancel(tgate_request *request);

TGATE_API tgate_code tgate_request_progress(const tgate_request *request, tgate_progress *progress, tgate_error **error);
/* What of the prompt did not fit, as it was written; "" where all of it did. Lives until the request is reset. */
TGATE_API const char *tgate_request_cut(const tgate_request *request);

/* Elements of one image's latents; and their dimensions, [C, h, w] or a video's four, into `shape`: how many there are. */
TGATE_API size_t tgate_request_latents_count(const tgate_request *request);
TGATE_API size_t tgate_request_latents_shape(const tgate_request *request, int64_t shape[8]);
/* One image's latents after the last step taken, float32, into `latents`, which has room for `count` elements. Fails
 * where a step failed or was ended midway: then some images may be a step further than others. */
TGATE_API tgate_code tgate_request_latents(const tgate_request *request, size_t image, float *latents, size_t count,
                                           tgate_error **error);

/* What tgate_request_decode gives of each image: `frames` pictures, one after the other. */
typedef struct tgate_picture_facts {
  size_t size;
  size_t bytes; /* frames x height x width x 3 */
  int32_t width, height, frames;
} tgate_picture_facts;
TGATE_API tgate_code tgate_picture_facts_init(tgate_picture_facts *facts, size_t size);
TGATE_API tgate_code tgate_request_picture_facts(const tgate_request *request, tgate_picture_facts *facts,
                                                 tgate_error **error);
/* Decode one image's latents as they are now: RGB, one byte a colour, rows from the top, into `pixels`. */
TGATE_API tgate_code tgate_request_decode(tgate_request *request, size_t image, uint8_t *pixels, size_t bytes,
                                          tgate_error **error);
/* The same of latents that were taken before, of a size (NULL: the session's first), in any thread: a server decodes beside
 * the thread that steps. `count` is that of one image's latents. */
TGATE_API tgate_code tgate_session_picture_facts(const tgate_session *session, const char *image_size,
                                                 tgate_picture_facts *facts, tgate_error **error);
TGATE_API tgate_code tgate_session_decode(const tgate_session *session, const char *image_size, const float *latents,
                                          size_t count, uint8_t *pixels, size_t bytes, tgate_error **error);

#ifdef __cplusplus
}
#endif

#endif /* TGATE_H */
