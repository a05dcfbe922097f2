/* The loop of a server, in C: requests arrive at different times, and those whose next steps run one graph share a call.
 *
 *     serve BUNDLE PROMPT...
 *
 * A request joins every third tick. In each tick, the graph that the oldest one waits for runs for all that wait for it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tgate.h>

enum { ROOM = 8 };

static int fail(tgate_error *error) {
  fprintf(stderr, "%s\n", tgate_error_text(error));
  tgate_error_free(error);
  return 1;
}

static tgate_progress progress_of(const tgate_request *request) {
  tgate_progress progress;
  tgate_progress_init(&progress, sizeof progress);
  tgate_request_progress(request, &progress, NULL);
  return progress;
}

int main(int count, char **words) {
  tgate_error *error = NULL;
  tgate_bundle *bundle = NULL;
  tgate_session *session = NULL;
  tgate_pool *pool = NULL;
  tgate_request *waiting[ROOM];
  size_t in_flight = 0;
  int next = 2, finished = 0, calls = 0;
  if (count < 3) {
    fprintf(stderr, "usage: serve BUNDLE PROMPT...\n");
    return 2;
  }
  tgate_pool_options room;
  tgate_pool_options_init(&room, sizeof room);
  room.images = ROOM;
  if (tgate_bundle_open(words[1], NULL, &bundle, &error) || tgate_session_open(bundle, NULL, &session, &error) ||
      tgate_pool_create(session, &room, &pool, &error)) {
    return fail(error);
  }
  for (int tick = 0; next < count || in_flight > 0; ++tick) {
    if (next < count && in_flight < ROOM && (tick % 3 == 0 || in_flight == 0)) {
      tgate_request_options ask;
      tgate_request_options_init(&ask, sizeof ask);
      ask.pool = pool;
      ask.prompt = words[next];
      ask.seed = (uint64_t)next++;
      if (tgate_request_create(session, &ask, &waiting[in_flight], &error)) {
        return fail(error);
      }
      ++in_flight;
    }
    tgate_request *together[ROOM];
    int32_t stopped[ROOM];
    size_t same = 0;
    const tgate_progress oldest = progress_of(waiting[0]);
    for (size_t i = 0; i < in_flight; ++i) {
      if (strcmp(progress_of(waiting[i]).graph, oldest.graph) == 0) {
        together[same++] = waiting[i];
      }
    }
    if (tgate_batch(together, same, stopped, &error)) {
      return fail(error);
    }
    for (size_t i = 0; i < same; ++i) {
      for (size_t j = 0; stopped[i] && j < in_flight; ++j) { /* cancelled, or failed alone: its place is free again */
        if (waiting[j] == together[i]) {
          tgate_request_free(waiting[j]);
          waiting[j] = waiting[--in_flight];
          break;
        }
      }
    }
    ++calls;
    printf("%-12s for %zu of %zu\n", oldest.graph, same, in_flight);
    size_t left = 0;
    for (size_t i = 0; i < in_flight; ++i) {
      if (progress_of(waiting[i]).graph == NULL) { /* at its end: here its picture would be decoded and sent */
        tgate_request_free(waiting[i]);
        ++finished;
      } else {
        waiting[left++] = waiting[i];
      }
    }
    in_flight = left;
  }
  printf("%d requests in %d calls\n", finished, calls);
  tgate_pool_free(pool);
  tgate_session_free(session);
  tgate_bundle_free(bundle);
  return 0;
}
