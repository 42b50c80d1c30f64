// histogram.h - a histogram of nanoseconds in 64 steps an octave: quantiles are off by less than 1.6 %.
#pragma once
#include "common.h"

typedef struct {
  uint64_t bucket[64 * 64], count, largest;
} histogram;

static inline void histogram_add(histogram *h, uint64_t value) {
  if (!value) value = 1;
  int octave = 63 - __builtin_clzll(value);
  int step = (int)((octave < 6 ? value << (6 - octave) : value >> (octave - 6)) & 63);
  h->bucket[octave * 64 + step]++;
  h->count++;
  if (value > h->largest) h->largest = value;
}

// In milliseconds; 0 when empty.
static inline double histogram_quantile_ms(const histogram *h, double q) {
  if (!h->count) return 0;
  uint64_t rank = (uint64_t)(q * (double)(h->count - 1)), seen = 0;
  for (int i = 0; i < 64 * 64; i++) {
    seen += h->bucket[i];
    if (seen <= rank) continue;
    int octave = i / 64;
    uint64_t step = (uint64_t)(i % 64);
    uint64_t low = 1ull << octave;
    return (double)(low + (octave < 6 ? step >> (6 - octave) : step << (octave - 6))) / 1e6;
  }
  return (double)h->largest / 1e6;
}
