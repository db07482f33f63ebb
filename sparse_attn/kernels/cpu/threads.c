/* Splits work over threads that live no longer than a call, so that a process can fork between calls. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_THREADS = 256, ALIGNMENT = 64 };

enum { CHUNKS_PER_THREAD = 8, ENTRIES_PER_THREAD = 1 << 15 }; /* a thread costs about 20 µs */

typedef struct {
    const job *of;
    int64_t chunk; /* items that a thread takes at a time */
    atomic_llong next;
    atomic_int failed;
} progress;

static void *work(void *argument) {
    progress *all = argument;
    const job *j = all->of;
    char *memory = malloc(j->scratch + ALIGNMENT);
    if (!memory) {
        atomic_store(&all->failed, 1);
        return NULL;
    }
    void *scratch = memory + (ALIGNMENT - (uintptr_t)memory % ALIGNMENT); /* aligned only for speed */
    if (j->open) j->open(j->task, scratch);
    for (;;) {
        int64_t begin = atomic_fetch_add(&all->next, all->chunk), end = begin + all->chunk;
        if (begin >= j->items) break;
        j->part(j->task, begin, end < j->items ? end : j->items, scratch);
    }
    free(memory);
    return NULL;
}

int run_job(const job *j, int threads) {
    if (j->items == 0) return 0;
    int64_t worth = j->entries / ENTRIES_PER_THREAD;
    if (worth > j->items) worth = j->items;
    if (threads > worth) threads = (int)worth;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 1) threads = 1;
    progress all = {.of = j, .chunk = threads == 1 ? j->items : (j->items - 1) / (threads * CHUNKS_PER_THREAD) + 1};

    pthread_t others[MAX_THREADS];
    int started = 0;
    while (started < threads - 1 && pthread_create(&others[started], NULL, work, &all) == 0) started++;
    work(&all);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    return atomic_load(&all.failed);
}
