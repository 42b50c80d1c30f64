// timers.h - a binary heap of things that are due, kept inside the things themselves.
#pragma once
#include "common.h"

typedef struct timer {
  uint64_t due;
  int place;  // index in the heap; -1 = not in it
} timer;

static timer **timers;
static int timer_count, timer_room;

static inline void timer_put(int place, timer *t) {
  timers[place] = t;
  t->place = place;
}

static inline void timer_rise(int place) {
  timer *t = timers[place];
  for (; place > 0 && timers[(place - 1) / 2]->due > t->due; place = (place - 1) / 2)
    timer_put(place, timers[(place - 1) / 2]);
  timer_put(place, t);
}

static inline void timer_sink(int place) {
  timer *t = timers[place];
  for (int child; (child = 2 * place + 1) < timer_count; place = child) {
    if (child + 1 < timer_count && timers[child + 1]->due < timers[child]->due) child++;
    if (t->due <= timers[child]->due) break;
    timer_put(place, timers[child]);
  }
  timer_put(place, t);
}

static inline void timer_start(timer *t, uint64_t due) {
  t->due = due;
  if (timer_count == timer_room) {
    timer_room = timer_room ? timer_room * 2 : 1024;
    timers = realloc(timers, (size_t)timer_room * sizeof *timers);
    if (!timers) die("out of memory");
  }
  timer_put(timer_count++, t);
  timer_rise(t->place);
}

// The timer at the top comes again later.
static inline void timer_again(timer *t, uint64_t due) {
  t->due = due;
  timer_sink(t->place);
}

static inline void timer_stop(timer *t) {
  if (t->place < 0) return;
  int place = t->place;
  t->place = -1;
  timer *last = timers[--timer_count];
  if (last == t) return;
  timer_put(place, last);
  timer_rise(place);
  timer_sink(last->place);
}
