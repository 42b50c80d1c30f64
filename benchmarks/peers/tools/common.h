// common.h - what the tools share: the clock, growing buffers, options, and the engines' settings.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define NS_PER_US 1000ull
#define NS_PER_S 1000000000ull

static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

__attribute__((format(printf, 1, 2))) static inline void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  exit(1);
}

// Every tool holds thousands of connections; the soft limit is often 1,024.
static inline void raise_file_limit(void) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

// Bytes that grow at the end and are consumed at the front.
typedef struct {
  char *data;
  size_t start, length, room;
} buffer;

static inline char *buffer_head(const buffer *b) { return b->data + b->start; }

static inline char *buffer_reserve(buffer *b, size_t more) {
  if (b->start + b->length + more > b->room) {
    if (b->start) memmove(b->data, b->data + b->start, b->length);
    b->start = 0;
    if (b->length + more > b->room) {
      b->room = (b->length + more) * 2;
      b->data = realloc(b->data, b->room);
      if (!b->data) die("out of memory");
    }
  }
  return b->data + b->start + b->length;
}

static inline void buffer_add(buffer *b, const void *data, size_t n) {
  memcpy(buffer_reserve(b, n), data, n);
  b->length += n;
}

static inline void buffer_consume(buffer *b, size_t n) {
  b->start += n;
  b->length -= n;
  if (!b->length) b->start = 0;
}

// How an engine answers streamed requests; changed at run time through its standard input (see control.h).
typedef struct {
  int events;            // tokens of a stream, one SSE event each; [DONE] comes on top
  uint64_t first_ns;     // from the request to its first token
  uint64_t interval_ns;  // from token to token; 0 = the whole answer at once
  int lockstep;          // 1: all tokens of all engines at the same instants, as the steps of one batching engine
} schedule;

// When the first token of a request that came at `now` is due.
static inline uint64_t first_due(const schedule *s, uint64_t now) {
  uint64_t due = now + s->first_ns;
  return s->lockstep && s->interval_ns ? (due / s->interval_ns + 1) * s->interval_ns : due;
}
