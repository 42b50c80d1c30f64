// native_engine.c - a fake engine that speaks Penstock's native protocol (docs/wire.md), for measuring it.
//
//   native_engine --engines 4 --control ENDPOINT --load ENDPOINT      the endpoints are those of GET /endpoints
//
// Streams go in steps: whatever is due for one frontend at one instant travels in ONE Step message. An unstreamed
// answer goes out at once, each in a message of its own. In lockstep all engines step together; otherwise each request
// gets its first token on time and the next ones in the steps of its engine, the engines being out of phase.
// One thread, one ROUTER, DEALER and PUB per engine. Prints "registered" once the scheduler has accepted all engines.
// See control.h for how it is steered.
#define _GNU_SOURCE
#include <errno.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <zmq.h>

#include "answers.h"
#include "common.h"
#include "control.h"
#include "msgpack.h"

#define MAX_ENGINES 16
#define MAX_FRONTENDS 64
#define PROTOCOL 1
#define BEAT_NS (NS_PER_S / 2)
#define DEAD_AFTER_NS (5 * BEAT_NS)
#define LOAD_AT_MOST_EVERY_NS (NS_PER_S / 50)
#define SEND_MARK 4096

enum {  // tags of docs/wire.md
  ENGINE_HELLO = 32, ENGINE_BEAT = 33,
  ACCEPTED = 48, REFUSED = 49, SCHEDULER_BEAT = 50, HELLO_AGAIN = 51,
  DATA_HELLO = 64, PING = 65, REQUEST = 66, ABORT = 67,
  DATA_WELCOME = 80, PONG = 81, STEP = 82,
};
enum { CHUNK, DONE, ERROR };  // kinds of delta

typedef struct {
  uint64_t id, sequence, due;
  int kind, left;
} stream;

typedef struct {
  char name[256];  // its ROUTER's routing id
  size_t name_length;
  uint64_t heard;
  stream *streams;
  size_t count, room;
} frontend;

typedef struct {
  void *data, *control, *load;
  unsigned char incarnation[16];
  char endpoint[128];
  frontend frontends[MAX_FRONTENDS];
  size_t frontend_count, running, published;
  uint64_t epoch, phase_ns, next_say, load_sent, load_sequence;
  int registered;
} engine;

static engine engines[MAX_ENGINES];
static int engine_count = 1, announced;
static schedule plan = {.events = 64};
static counts total;
static void *context;

// -- sending --------------------------------------------------------------------------------------------------

// A frontend that is gone or takes no more loses the message, which is counted: a run in which that happens is void.
static void send_data(engine *e, const frontend *f, const buffer *message) {
  if (zmq_send(e->data, f->name, f->name_length, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0 ||
      zmq_send(e->data, message->data, message->length, ZMQ_DONTWAIT) < 0)
    total.refused++;
}

static void send_control(engine *e, const buffer *message) {
  zmq_send(e->control, message->data, message->length, ZMQ_DONTWAIT);  // what matters is said again
}

static void begin_step(buffer *b, const engine *e, size_t deltas) {
  b->length = 0;
  pack_array(b, 3);
  pack_uint(b, STEP);
  pack_bin(b, e->incarnation, sizeof e->incarnation);
  pack_array(b, deltas);
}

static void pack_delta(buffer *b, uint64_t id, uint64_t sequence, int kind, bytes data) {
  pack_array(b, 4);
  pack_uint(b, id);
  pack_uint(b, sequence);
  pack_uint(b, (uint64_t)kind);
  pack_bin(b, data.data, data.length);
}

// -- requests -------------------------------------------------------------------------------------------------

static void refuse(engine *e, const frontend *f, uint64_t id, int status) {
  static const char body[] = "{\"error\":{\"message\":\"refused\",\"type\":\"engine_error\",\"code\":null}}";
  static buffer out;
  begin_step(&out, e, 1);
  pack_array(&out, 5);
  pack_uint(&out, id);
  pack_uint(&out, 0);
  pack_uint(&out, ERROR);
  pack_bin(&out, body, sizeof body - 1);
  pack_uint(&out, (uint64_t)status);
  send_data(e, f, &out);
}

static void open_stream(engine *e, frontend *f, uint64_t id, int kind, uint64_t now) {
  if (f->count == f->room) {
    f->room = f->room ? f->room * 2 : 256;
    f->streams = realloc(f->streams, f->room * sizeof *f->streams);
    if (!f->streams) die("out of memory");
  }
  f->streams[f->count++] = (stream){.id = id, .due = first_due(&plan, now), .kind = kind, .left = plan.events};
  e->running++;
  total.streams++;
}

static void on_request(engine *e, frontend *f, reader *r, uint64_t now) {
  static buffer out;
  size_t n, path_length;
  const char *incarnation = read_bytes(r, &n);
  int ours = n == sizeof e->incarnation && !memcmp(incarnation, e->incarnation, n);
  uint64_t id = read_uint(r);
  const char *path = read_bytes(r, &path_length);
  int streamed = read_bool(r);  // headers and transfer follow; they do not matter here
  if (r->bad) die("malformed Request");
  int kind = kind_of_path(path, path_length);
  total.requests++;
  if (!ours || kind < 0) {
    refuse(e, f, id, ours ? 404 : 409);
  } else if (streamed) {
    open_stream(e, f, id, kind, now);
  } else {
    begin_step(&out, e, 1);
    pack_delta(&out, id, 0, DONE, ANSWER[kind]);
    send_data(e, f, &out);
  }
}

static void end_stream(engine *e, frontend *f, size_t i) {
  f->streams[i] = f->streams[--f->count];
  e->running--;
}

static void on_abort(engine *e, frontend *f, reader *r) {
  for (size_t n = read_array(r); n && !r->bad; n--) {
    uint64_t id = read_uint(r);
    for (size_t i = 0; i < f->count; i++)
      if (f->streams[i].id == id) {
        end_stream(e, f, i);
        total.aborted++;
        break;
      }
  }
}

// The first step of this engine after `now`.
static uint64_t next_step(const engine *e, uint64_t now) {
  return ((now - e->phase_ns) / plan.interval_ns + 1) * plan.interval_ns + e->phase_ns;
}

// The tokens of one frontend that are due, in one message. Returns when its next one is due, UINT64_MAX = never.
static uint64_t step_frontend(engine *e, frontend *f, uint64_t now) {
  static buffer out;
  size_t deltas = 0;
  uint64_t next = UINT64_MAX;
  for (size_t i = 0; i < f->count; i++)
    if (f->streams[i].due <= now) deltas += f->streams[i].left > 1 ? 1 : 2;
  if (deltas) begin_step(&out, e, deltas);
  for (size_t i = 0; i < f->count;) {
    stream *s = &f->streams[i];
    if (s->due <= now) {
      pack_delta(&out, s->id, s->sequence++, CHUNK, EVENT[s->kind]);
      total.events++;
      s->due = plan.interval_ns ? (plan.lockstep ? s->due + plan.interval_ns : next_step(e, s->due)) : now;
      if (!--s->left) {
        pack_delta(&out, s->id, s->sequence, DONE, LAST_EVENT);
        end_stream(e, f, i);
        continue;
      }
    }
    if (s->due < next) next = s->due;
    i++;
  }
  if (deltas) send_data(e, f, &out);
  return next;
}

static uint64_t step_all(uint64_t now) {
  uint64_t next = UINT64_MAX;
  for (int i = 0; i < engine_count; i++)
    for (size_t k = 0; k < engines[i].frontend_count; k++) {
      uint64_t due = step_frontend(&engines[i], &engines[i].frontends[k], now);
      if (due < next) next = due;
    }
  return next;
}

// -- frontends ------------------------------------------------------------------------------------------------

static frontend *frontend_of(engine *e, const char *name, size_t n, uint64_t now) {
  frontend *found = NULL;
  for (size_t i = 0; i < e->frontend_count && !found; i++)
    if (e->frontends[i].name_length == n && !memcmp(e->frontends[i].name, name, n)) found = &e->frontends[i];
  if (!found) {
    if (e->frontend_count == MAX_FRONTENDS || n > sizeof found->name) die("too many frontends");
    found = &e->frontends[e->frontend_count++];
    *found = (frontend){.name_length = n};
    memcpy(found->name, name, n);
  }
  found->heard = now;
  return found;
}

static void reply(engine *e, const frontend *f, int tag) {
  static buffer out;
  out.length = 0;
  pack_array(&out, tag == DATA_WELCOME ? 3 : 2);
  pack_uint(&out, (uint64_t)tag);
  if (tag == DATA_WELCOME) pack_uint(&out, PROTOCOL);
  pack_bin(&out, e->incarnation, sizeof e->incarnation);
  send_data(e, f, &out);
}

// One message of a frontend, if there is one.
static int receive_data(engine *e, uint64_t now) {
  char name[256];
  int n = zmq_recv(e->data, name, sizeof name, ZMQ_DONTWAIT);
  if (n < 0) return 0;
  frontend *f = frontend_of(e, name, (size_t)n, now);
  zmq_msg_t message, body;
  zmq_msg_init(&message);
  if (zmq_msg_recv(&message, e->data, ZMQ_DONTWAIT) < 0) die("a message of one frame");
  reader r = read_from(zmq_msg_data(&message), zmq_msg_size(&message));
  read_array(&r);
  uint64_t tag = read_uint(&r);
  if (zmq_msg_more(&message)) {
    zmq_msg_init(&body);
    zmq_msg_recv(&body, e->data, ZMQ_DONTWAIT);
    zmq_msg_close(&body);
  }
  switch (tag) {
    case DATA_HELLO: reply(e, f, DATA_WELCOME); break;
    case PING: reply(e, f, PONG); break;
    case REQUEST: on_request(e, f, &r, now); break;
    case ABORT: on_abort(e, f, &r); break;
    default: die("a frontend said %lu", tag);
  }
  zmq_msg_close(&message);
  return 1;
}

// -- the scheduler --------------------------------------------------------------------------------------------

static void say_hello(engine *e, uint64_t now) {
  static buffer out;
  out.length = 0;
  pack_array(&out, 8);
  pack_uint(&out, ENGINE_HELLO);
  pack_uint(&out, PROTOCOL);
  pack_bin(&out, e->incarnation, sizeof e->incarnation);
  pack_str(&out, e->endpoint);
  pack_uint(&out, 0);  // role: mixed
  pack_array(&out, 1);
  pack_str(&out, "mock");
  pack_uint(&out, 0);  // capacity: it does not say
  pack_bin(&out, "", 0);
  send_control(e, &out);
  e->registered = 0;
  e->next_say = now + 2 * BEAT_NS;
}

static void say_beat(engine *e, uint64_t now) {
  static buffer out;
  out.length = 0;
  pack_array(&out, 4);
  pack_uint(&out, ENGINE_BEAT);
  pack_bin(&out, e->incarnation, sizeof e->incarnation);
  pack_uint(&out, 0);
  pack_bool(&out, 1);
  send_control(e, &out);
  e->next_say = now + BEAT_NS;
}

static int receive_control(engine *e, uint64_t now) {
  char message[4096];
  int n = zmq_recv(e->control, message, sizeof message, ZMQ_DONTWAIT);
  if (n < 0) return 0;
  reader r = read_from(message, (size_t)n < sizeof message ? (size_t)n : sizeof message);
  read_array(&r);
  uint64_t epoch;
  size_t length;
  switch (read_uint(&r)) {
    case ACCEPTED:
      read_uint(&r);
      e->epoch = read_uint(&r);
      e->registered = 1;
      e->next_say = now + BEAT_NS;
      break;
    case REFUSED: {
      const char *why = read_bytes(&r, &length);
      die("refused: %.*s", (int)length, why);
      break;
    }
    case SCHEDULER_BEAT:
      epoch = read_uint(&r);
      if (e->registered && epoch != e->epoch) say_hello(e, now);
      break;
    case HELLO_AGAIN:
      if (e->registered) say_hello(e, now);
      break;
    default: die("the scheduler said something unknown");
  }
  return 1;
}

static void publish(engine *e, uint64_t now) {
  static buffer out;
  unsigned char sequence[8];
  for (int i = 0; i < 8; i++) sequence[i] = (unsigned char)(e->load_sequence >> (8 * (7 - i)));
  out.length = 0;
  pack_array(&out, 6);
  pack_str(&out, "Load");
  pack_bin(&out, e->incarnation, sizeof e->incarnation);
  pack_uint(&out, e->running);
  pack_uint(&out, 0);
  pack_int(&out, -1);
  pack_int(&out, -1);
  zmq_send(e->load, "load", 4, ZMQ_DONTWAIT | ZMQ_SNDMORE);
  zmq_send(e->load, sequence, sizeof sequence, ZMQ_DONTWAIT | ZMQ_SNDMORE);
  zmq_send(e->load, out.data, out.length, ZMQ_DONTWAIT);
  e->load_sequence++;
  e->load_sent = now;
  e->published = e->running;
}

// Beats, load reports, silent frontends. Returns when it wants to be called again.
static uint64_t look_after(engine *e, uint64_t now) {
  if (now >= e->next_say) {
    if (e->registered) say_beat(e, now);
    else say_hello(e, now);
  }
  uint64_t load_due = e->load_sent + (e->published == e->running ? NS_PER_S : LOAD_AT_MOST_EVERY_NS);
  if (now >= load_due) {
    publish(e, now);
    load_due = now + NS_PER_S;
  }
  for (size_t i = 0; i < e->frontend_count; i++) {
    frontend *f = &e->frontends[i];
    if (f->count && now - f->heard > DEAD_AFTER_NS) {
      total.aborted += f->count;
      e->running -= f->count;
      f->count = 0;
    }
  }
  return e->next_say < load_due ? e->next_say : load_due;
}

// -- the loop -------------------------------------------------------------------------------------------------

static void *open_socket(int type, int send_mark) {
  void *s = zmq_socket(context, type);
  int linger = 0;
  if (!s) die("zmq: %s", zmq_strerror(errno));
  zmq_setsockopt(s, ZMQ_LINGER, &linger, sizeof linger);
  zmq_setsockopt(s, ZMQ_SNDHWM, &send_mark, sizeof send_mark);
  return s;
}

static void start(engine *e, int number, const char *control, const char *load) {
  int on = 1;
  if (getrandom(e->incarnation, sizeof e->incarnation, 0) != sizeof e->incarnation) die("no random bytes");
  e->incarnation[0] |= 1;  // a routing id must not begin with zero
  int at = snprintf(e->endpoint, sizeof e->endpoint, "ipc://@penstock-bench-");
  for (size_t i = 0; i < sizeof e->incarnation; i++) at += sprintf(e->endpoint + at, "%02x", e->incarnation[i]);

  e->data = open_socket(ZMQ_ROUTER, SEND_MARK);
  zmq_setsockopt(e->data, ZMQ_ROUTER_MANDATORY, &on, sizeof on);
  zmq_setsockopt(e->data, ZMQ_ROUTER_HANDOVER, &on, sizeof on);
  e->control = open_socket(ZMQ_DEALER, 16);
  zmq_setsockopt(e->control, ZMQ_IMMEDIATE, &on, sizeof on);
  zmq_setsockopt(e->control, ZMQ_ROUTING_ID, e->incarnation, sizeof e->incarnation);
  e->load = open_socket(ZMQ_PUB, 8);
  if (zmq_bind(e->data, e->endpoint) || zmq_connect(e->control, control) || zmq_connect(e->load, load))
    die("engine %d: %s", number, zmq_strerror(errno));
}

static void watch(int epoll, void *socket) {
  int fd;
  size_t n = sizeof fd;
  zmq_getsockopt(socket, ZMQ_FD, &fd, &n);
  struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
}

static void announce(void) {
  for (int i = 0; i < engine_count; i++)
    if (!engines[i].registered) return;
  if (!announced) puts("registered"), fflush(stdout);
  announced = 1;
}

int main(int argc, char **argv) {
  const char *control = NULL, *load = NULL;
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 < argc && !strcmp(argv[i], "--control")) control = argv[i + 1];
    else if (i + 1 < argc && !strcmp(argv[i], "--load")) load = argv[i + 1];
    else if (i + 1 < argc && !strcmp(argv[i], "--engines")) engine_count = atoi(argv[i + 1]);
    else die("usage: native_engine --control ENDPOINT --load ENDPOINT [--engines 1..%d]", MAX_ENGINES);
  }
  if (!control || !load || engine_count < 1 || engine_count > MAX_ENGINES) die("a bad or missing option");
  raise_file_limit();
  context = zmq_ctx_new();
  int epoll = epoll_create1(EPOLL_CLOEXEC);
  for (int i = 0; i < engine_count; i++) {
    start(&engines[i], i, control, load);
    watch(epoll, engines[i].data);
    watch(epoll, engines[i].control);
  }
  control_open();
  struct epoll_event input = {.events = EPOLLIN, .data.fd = STDIN_FILENO}, ready[2 * MAX_ENGINES + 1];
  epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &input);

  for (;;) {
    // A ZMQ descriptor signals edges, and a send may swallow one: all sockets are read until nothing is left anywhere,
    // and only then is it safe to sleep.
    uint64_t now = now_ns(), wake = step_all(now);
    for (int i = 0; i < engine_count; i++) {
      uint64_t due = look_after(&engines[i], now);
      if (due < wake) wake = due;
    }
    int busy = 0;
    for (int i = 0; i < engine_count; i++) {
      while (receive_control(&engines[i], now)) busy = 1;
      for (int k = 0; k < 256 && receive_data(&engines[i], now); k++) busy = 1;
    }
    if (!announced) announce();
    now = now_ns();
    uint64_t ns = wake > now && !busy ? wake - now : 0;
    struct timespec wait = {.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
    int n = epoll_pwait2(epoll, ready, 2 * MAX_ENGINES + 1, &wait, NULL);
    for (int i = 0; i < n; i++)
      if (ready[i].data.fd == STDIN_FILENO) control_read(&plan, &total);
    for (int i = 0; i < engine_count; i++) engines[i].phase_ns = plan.interval_ns * (uint64_t)i / (uint64_t)engine_count;
  }
}
