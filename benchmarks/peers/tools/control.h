// control.h - an engine is steered by lines on its standard input and answers each with one line.
//
//   set events=64 first_us=20000 interval_us=20000 lockstep=1      -> ok
//   stats                                                          -> {"requests": ..., ...}
//
// End of input ends the engine, so that it never outlives the harness.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include "common.h"

typedef struct {
  uint64_t requests, streams, events, aborted, refused;
} counts;

static inline void control_open(void) { fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK); }

static inline void control_set(char *line, schedule *s) {
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) {
    char *equals = strchr(word, '=');
    if (!equals) continue;
    *equals = 0;
    uint64_t value = strtoull(equals + 1, NULL, 10);
    if (!strcmp(word, "events")) s->events = (int)value;
    else if (!strcmp(word, "first_us")) s->first_ns = value * NS_PER_US;
    else if (!strcmp(word, "interval_us")) s->interval_ns = value * NS_PER_US;
    else if (!strcmp(word, "lockstep")) s->lockstep = value != 0;
    else die("no setting is called %s", word);
  }
}

// Handles what has been typed. Exits at the end of input.
static inline void control_read(schedule *s, const counts *c) {
  static buffer in;
  ssize_t n = read(STDIN_FILENO, buffer_reserve(&in, 4096), 4096);
  if (n == 0) exit(0);
  if (n < 0) return;
  in.length += (size_t)n;
  for (char *end; in.length && (end = memchr(buffer_head(&in), '\n', in.length));) {
    char *line = buffer_head(&in);
    *end = 0;
    if (!strncmp(line, "set ", 4)) {
      control_set(line + 4, s);
      puts("ok");
    } else if (!strcmp(line, "stats")) {
      printf("{\"requests\": %lu, \"streams\": %lu, \"events\": %lu, \"aborted\": %lu, \"refused\": %lu}\n",
             c->requests, c->streams, c->events, c->aborted, c->refused);
    } else {
      die("no command is called %s", line);
    }
    fflush(stdout);
    buffer_consume(&in, (size_t)(end + 1 - line));
  }
}
