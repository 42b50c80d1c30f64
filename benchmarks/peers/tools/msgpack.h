// msgpack.h - as much of msgpack as docs/wire.md needs, by hand: writing into a buffer, reading with bounds checked.
#pragma once
#include "common.h"

// -- writing --------------------------------------------------------------------------------------------------

static inline void pack_raw(buffer *b, int head, uint64_t value, int width) {
  char *p = buffer_reserve(b, 9);
  *p++ = (char)head;
  for (int i = width - 1; i >= 0; i--) *p++ = (char)(value >> (8 * i));
  b->length += 1 + (size_t)width;
}

static inline void pack_uint(buffer *b, uint64_t v) {
  if (v < 128) pack_raw(b, (int)v, 0, 0);
  else if (v <= UINT16_MAX) pack_raw(b, 0xcd, v, 2);
  else if (v <= UINT32_MAX) pack_raw(b, 0xce, v, 4);
  else pack_raw(b, 0xcf, v, 8);
}

static inline void pack_int(buffer *b, int64_t v) {
  if (v >= 0) pack_uint(b, (uint64_t)v);
  else pack_raw(b, 0xd3, (uint64_t)v, 8);
}

static inline void pack_array(buffer *b, size_t n) {
  if (n < 16) pack_raw(b, 0x90 | (int)n, 0, 0);
  else if (n <= UINT16_MAX) pack_raw(b, 0xdc, n, 2);
  else pack_raw(b, 0xdd, n, 4);
}

static inline void pack_bool(buffer *b, int v) { pack_raw(b, v ? 0xc3 : 0xc2, 0, 0); }

static inline void pack_bin(buffer *b, const void *data, size_t n) {
  if (n <= UINT8_MAX) pack_raw(b, 0xc4, n, 1);
  else if (n <= UINT16_MAX) pack_raw(b, 0xc5, n, 2);
  else pack_raw(b, 0xc6, n, 4);
  buffer_add(b, data, n);
}

static inline void pack_str(buffer *b, const char *text) {
  size_t n = strlen(text);
  if (n < 32) pack_raw(b, 0xa0 | (int)n, 0, 0);
  else if (n <= UINT8_MAX) pack_raw(b, 0xd9, n, 1);
  else pack_raw(b, 0xda, n, 2);
  buffer_add(b, text, n);
}

// -- reading --------------------------------------------------------------------------------------------------
// A reader that met something else than was asked for is `bad` from then on and gives zeros.

typedef struct {
  const unsigned char *at, *end;
  int bad;
} reader;

static inline reader read_from(const void *data, size_t n) {
  return (reader){.at = data, .end = (const unsigned char *)data + n};
}

static inline uint64_t read_number(reader *r, int width) {
  if (r->bad || r->end - r->at < width) {
    r->bad = 1;
    return 0;
  }
  uint64_t v = 0;
  for (int i = 0; i < width; i++) v = v << 8 | *r->at++;
  return v;
}

static inline uint64_t read_uint(reader *r) {
  int head = (int)read_number(r, 1);
  if (head < 128) return (uint64_t)head;
  if (head >= 0xcc && head <= 0xcf) return read_number(r, 1 << (head - 0xcc));
  if (head >= 0xd0 && head <= 0xd3) {  // a signed encoding may carry it too
    int width = 1 << (head - 0xd0);
    uint64_t v = read_number(r, width);
    if (!(v >> (8 * width - 1))) return v;
  }
  r->bad = 1;
  return 0;
}

static inline size_t read_array(reader *r) {
  int head = (int)read_number(r, 1);
  if ((head & 0xf0) == 0x90) return (size_t)(head & 15);
  if (head == 0xdc || head == 0xdd) return (size_t)read_number(r, head == 0xdc ? 2 : 4);
  r->bad = 1;
  return 0;
}

static inline int read_bool(reader *r) {
  int head = (int)read_number(r, 1);
  if (head != 0xc2 && head != 0xc3) r->bad = 1;
  return head == 0xc3;
}

// A str or a bin; points into the message.
static inline const char *read_bytes(reader *r, size_t *n) {
  int head = (int)read_number(r, 1);
  *n = 0;
  if ((head & 0xe0) == 0xa0) *n = (size_t)(head & 31);
  else if (head >= 0xd9 && head <= 0xdb) *n = (size_t)read_number(r, 1 << (head - 0xd9));
  else if (head >= 0xc4 && head <= 0xc6) *n = (size_t)read_number(r, 1 << (head - 0xc4));
  else r->bad = 1;
  if (r->bad || (size_t)(r->end - r->at) < *n) {
    r->bad = 1;
    *n = 0;
    return "";
  }
  const char *data = (const char *)r->at;
  r->at += *n;
  return data;
}
