/* The log. The tests read it through stub_event_count and stub_event_at: see log.py. */
#include "stub.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stub_event *events;
static size_t count, room;

void stub_note(struct stub_event event) {
    pthread_mutex_lock(&lock);
    if (count == room) {
        room = room ? 2 * room : 1 << 14;
        events = realloc(events, room * sizeof *events);
        if (!events) abort();
    }
    events[count++] = event;
    pthread_mutex_unlock(&lock);
}

int stub_refuse(const char *name, int error) {
    int known = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++) known |= events[i].kind == STUB_REFUSED && !strcmp(events[i].name, name);
    pthread_mutex_unlock(&lock);
    if (!known) fprintf(stderr, "cuda stub: %s is not answered; write it in tests/cuda_stub\n", name);
    stub_note((struct stub_event){.kind = STUB_REFUSED, .name = name});
    return error;
}

int stub_refuse_number(const char *name, int number, int error) {
    size_t bytes = strlen(name) + 16;
    char *text = malloc(bytes); /* kept by the log */
    if (!text) abort();
    snprintf(text, bytes, "%s %d", name, number);
    return stub_refuse(text, error);
}

size_t stub_event_count(void) { return count; }

/* Copies `number` events, from `first` on, which are there. */
void stub_events(size_t first, size_t number, struct stub_event *into) {
    pthread_mutex_lock(&lock);
    memcpy(into, events + first, number * sizeof *into);
    pthread_mutex_unlock(&lock);
}
