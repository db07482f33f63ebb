/* Splits work over threads, for rows.c and attention.c. */
#ifndef SPARSE_ATTN_THREADS_H
#define SPARSE_ATTN_THREADS_H

#include <stddef.h>
#include <stdint.h>

/* Items 0, 1, ... `items` - 1, each computed by one thread. */
typedef struct {
    void (*open)(const void *task, void *scratch); /* prepares the scratch memory of a thread; may be NULL */
    void (*part)(const void *task, int64_t begin, int64_t end, void *scratch);
    const void *task;
    int64_t items;
    int64_t entries; /* of the whole work; each takes about a nanosecond */
    size_t scratch;  /* bytes that each thread needs */
} job;

/* Runs a job in at most `threads` threads, fewer for little work. Returns 0, or 1 if there was not enough memory. */
int run_job(const job *j, int threads);

#endif
