// loadgen.c - closed-loop HTTP/1.1 keep-alive load for routers; knows SSE and checks every byte of every answer.
//
//   loadgen --port 8000 --bodies FILE --expect FILE --conns 32 --seconds 5 [--warmup 1] [--ramp-ms 0] [--drain 3]
//           [--path /v1/chat/completions] [--hold]
//
// --bodies  one JSON body a line; request k carries line k mod the number of lines, whoever sends it
// --expect  what the body of every answer must be, byte for byte (for SSE: of the whole stream, unchunked)
// --hold    instead of running for a time, open one stream per connection, print "held" once each has had its first
//           event, and stop at the end of standard input
//
// Prints one JSON object. Rates and times are those of the window [warmup, warmup + seconds]; the counts of "run" are
// those of the whole run, for cost per unit. An event ends with a blank line. A gap is the time between two events of a
// stream; events that came in one read have gap 0. One thread, epoll.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "histogram.h"

typedef enum { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER } state;

typedef struct {
  int fd, busy, wants_out;
  const buffer *request;
  size_t sent;
  state state;
  int status, chunked, close_after, extended, empty_line, newline, differs;
  size_t need, body_length;
  char head[8192];
  size_t head_length;
  uint64_t asked, last_event, events;
} conn;

static struct {
  uint64_t sent, answered, events, wrong_status, last_wrong_status, wrong_body, broken, unfinished, reads;
} run;
static struct {
  uint64_t begin, end, answered, events, bytes;
  histogram total, first, gap;
} window;

static struct sockaddr_in address;
static int epoll, stopping, hold;
static size_t in_flight, held;
static buffer *requests, expected;
static size_t request_count, next_request;

static int in_window(uint64_t t) { return t >= window.begin && t < window.end; }

// -- connections ----------------------------------------------------------------------------------------------

static int dial(conn *c) {
  int on = 1;
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
    close(c->fd);
    c->fd = -1;
    return 0;
  }
  fcntl(c->fd, F_SETFL, O_NONBLOCK);
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
  c->wants_out = 0;
  return 1;
}

static void ask(conn *c);

static void redial(conn *c) {
  close(c->fd);
  if (!dial(c)) run.broken++;
  else if (!stopping) ask(c);
}

// The answer can no longer come on this connection.
static void break_off(conn *c) {
  if (c->busy) run.broken++, in_flight--;
  c->busy = 0;
  if (run.broken > 20000) stopping = 1;
  redial(c);
}

static void watch(conn *c, int wants_out) {
  if (c->wants_out == wants_out) return;
  c->wants_out = wants_out;
  struct epoll_event e = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
}

static void push(conn *c) {
  while (c->sent < c->request->length) {
    ssize_t n = send(c->fd, buffer_head(c->request) + c->sent, c->request->length - c->sent, MSG_NOSIGNAL);
    if (n > 0) c->sent += (size_t)n;
    else if (errno == EAGAIN) break;
    else if (errno != EINTR) return;  // the end of the connection is seen by reading
  }
  watch(c, c->sent < c->request->length);
}

static void ask(conn *c) {
  if (c->fd < 0) return;
  c->request = &requests[next_request++ % request_count];
  c->state = HEAD;
  c->head_length = c->sent = c->body_length = 0;
  c->events = 0;
  c->newline = c->differs = 0;
  c->asked = now_ns();
  c->busy = 1;
  in_flight++;
  run.sent++;
  push(c);
}

// -- answers --------------------------------------------------------------------------------------------------

static void on_body(conn *c, const char *data, size_t n, uint64_t now) {
  if (c->status == 200 && expected.data &&
      (c->body_length + n > expected.length || memcmp(expected.data + c->body_length, data, n)))
    c->differs = 1;
  c->body_length += n;
  uint64_t events = 0;
  const char *end = data + n;
  if (c->newline && n && *data == '\n') events++, data++, c->newline = 0;
  while (data < end) {
    const char *line = memchr(data, '\n', (size_t)(end - data));
    c->newline = line && line + 1 == end;
    if (!line || c->newline) break;
    events += line[1] == '\n';
    data = line + 1 + (line[1] == '\n');
  }
  if (!events) return;
  run.events += events;
  run.reads++;
  if (in_window(now)) {
    window.events += events;
    histogram_add(c->events ? &window.gap : &window.first, now - (c->events ? c->last_event : c->asked));
    for (uint64_t i = 1; i < events; i++) histogram_add(&window.gap, 0);
  }
  if (!c->events) held++;
  c->events += events;
  c->last_event = now;
}

static void on_answer(conn *c, uint64_t now) {
  c->busy = 0;
  in_flight--;
  if (c->status != 200) {
    run.wrong_status++;
    run.last_wrong_status = (uint64_t)c->status;
  } else if (c->differs || (expected.data && c->body_length != expected.length)) {
    run.wrong_body++;
  } else {
    run.answered++;
    if (in_window(now)) {
      window.answered++;
      histogram_add(&window.total, now - c->asked);
    }
  }
  if (c->close_after) redial(c);
  else if (!stopping) ask(c);
}

// False: neither a length nor chunks.
static int understand_head(conn *c) {
  int framed = c->chunked = c->close_after = 0;
  c->status = c->head_length > 12 ? atoi(c->head + 9) : 0;
  c->need = 0;
  for (char *line = strchr(c->head, '\n'); line; line = strchr(line, '\n')) {
    line++;
    if (!strncasecmp(line, "content-length:", 15)) framed = 1, c->need = strtoul(line + 15, NULL, 10);
    else if (!strncasecmp(line, "transfer-encoding: chunked", 26)) framed = c->chunked = 1;
    else if (!strncasecmp(line, "connection: close", 17)) c->close_after = 1;
  }
  return framed;
}

// False: the connection is of no more use.
static int on_data(conn *c, const char *data, size_t n, uint64_t now) {
  const char *end = data + n;
  while (data < end) {
    if (!c->busy) return 0;  // more than was asked for
    switch (c->state) {
      case HEAD: {
        size_t had = c->head_length, take = (size_t)(end - data), room = sizeof c->head - 1 - had;
        if (take > room) take = room;
        memcpy(c->head + had, data, take);
        c->head_length += take;
        char *blank = memmem(c->head, c->head_length, "\r\n\r\n", 4);
        if (!blank && c->head_length == sizeof c->head - 1) return 0;
        if (!blank) return 1;
        *blank = 0;
        data += (size_t)(blank + 4 - c->head) - had;
        if (!understand_head(c)) return 0;
        c->state = c->chunked ? CHUNK_SIZE : LENGTH;
        c->extended = 0;
        if (!c->chunked && !c->need) on_answer(c, now);
        break;
      }
      case LENGTH:
      case CHUNK_DATA: {
        size_t take = (size_t)(end - data) < c->need ? (size_t)(end - data) : c->need;
        on_body(c, data, take, now);
        data += take;
        c->need -= take;
        if (c->need) break;
        if (c->state == LENGTH) on_answer(c, now);
        else c->state = CHUNK_END;
        break;
      }
      case CHUNK_SIZE: {
        char byte = *data++;
        if (byte == '\n') c->state = c->need ? CHUNK_DATA : TRAILER, c->empty_line = 1;
        else if (byte == ';') c->extended = 1;
        else if (!c->extended && byte != '\r')
          c->need = c->need * 16 + (size_t)(byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        break;
      }
      case CHUNK_END:
        if (*data++ == '\n') c->state = CHUNK_SIZE, c->extended = 0;
        break;
      case TRAILER: {
        char byte = *data++;
        if (byte == '\n' && c->empty_line) on_answer(c, now);
        else if (byte != '\r') c->empty_line = byte == '\n';
        break;
      }
    }
  }
  return 1;
}

static void on_readable(conn *c) {
  static char data[1 << 18];
  ssize_t n = recv(c->fd, data, sizeof data, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  uint64_t now = now_ns();
  if (n > 0 && in_window(now)) window.bytes += (uint64_t)n;
  if (n <= 0 || !on_data(c, data, (size_t)n, now)) break_off(c);
}

// -- the run --------------------------------------------------------------------------------------------------

static buffer read_file(const char *name) {
  buffer b = {0};
  FILE *f = fopen(name, "r");
  if (!f) die("%s: %s", name, strerror(errno));
  for (size_t n; (n = fread(buffer_reserve(&b, 1 << 16), 1, 1 << 16, f));) b.length += n;
  fclose(f);
  return b;
}

static void build_requests(const char *name, const char *path) {
  buffer file = read_file(name);
  for (char *line = file.data, *end; line < file.data + file.length; line = end + 1) {
    end = memchr(line, '\n', (size_t)(file.data + file.length - line));
    if (!end) die("%s: the last line has no end", name);
    requests = realloc(requests, (request_count + 1) * sizeof *requests);
    buffer *b = &requests[request_count++];
    *b = (buffer){0};
    size_t length = (size_t)(end - line);
    b->length = (size_t)sprintf(buffer_reserve(b, 1024),
                                "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                                "Accept: */*\r\nContent-Length: %zu\r\n\r\n",
                                path, ntohs(address.sin_port), length);
    buffer_add(b, line, length);
  }
  free(file.data);
  if (!request_count) die("%s holds no request", name);
}

static void report(double seconds) {
  printf("{\"run\": {\"sent\": %lu, \"answered\": %lu, \"events\": %lu, \"wrong_status\": %lu, "
         "\"last_wrong_status\": %lu, \"wrong_body\": %lu, \"broken\": %lu, \"unfinished\": %lu}, ",
         run.sent, run.answered, run.events, run.wrong_status, run.last_wrong_status, run.wrong_body, run.broken,
         run.unfinished);
  printf("\"requests_per_s\": %.2f, \"events_per_s\": %.2f, \"megabytes_per_s\": %.3f, \"events_per_read\": %.3f, ",
         (double)window.answered / seconds, (double)window.events / seconds, (double)window.bytes / seconds / 1e6,
         run.reads ? (double)run.events / (double)run.reads : 0);
  struct {
    const char *name;
    histogram *h;
  } all[] = {{"latency", &window.total}, {"first", &window.first}, {"gap", &window.gap}};
  for (int i = 0; i < 3; i++)
    printf("\"%s_p50_ms\": %.4f, \"%s_p99_ms\": %.4f, \"%s_max_ms\": %.4f%s", all[i].name,
           histogram_quantile_ms(all[i].h, 0.5), all[i].name, histogram_quantile_ms(all[i].h, 0.99), all[i].name,
           (double)all[i].h->largest / 1e6, i < 2 ? ", " : "}\n");
}

int main(int argc, char **argv) {
  const char *path = "/v1/chat/completions", *bodies = NULL, *expect = NULL;
  int port = 8000, conn_count = 32;
  double seconds = 5, warmup = 1, ramp_ms = 0, drain = 3;
  for (int i = 1; i < argc; i++) {
    const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(name, "--hold")) {
      hold = 1;
      continue;
    }
    if (!strcmp(name, "--port")) port = atoi(value);
    else if (!strcmp(name, "--path")) path = value;
    else if (!strcmp(name, "--bodies")) bodies = value;
    else if (!strcmp(name, "--expect")) expect = value;
    else if (!strcmp(name, "--conns")) conn_count = atoi(value);
    else if (!strcmp(name, "--seconds")) seconds = atof(value);
    else if (!strcmp(name, "--warmup")) warmup = atof(value);
    else if (!strcmp(name, "--ramp-ms")) ramp_ms = atof(value);
    else if (!strcmp(name, "--drain")) drain = atof(value);
    else die("no option is called %s", name);
    i++;
  }
  if (!bodies || conn_count < 1) die("--bodies and --conns are needed");
  signal(SIGPIPE, SIG_IGN);
  raise_file_limit();
  address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  build_requests(bodies, path);
  if (expect) expected = read_file(expect);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  conn *conns = calloc((size_t)conn_count, sizeof *conns);
  for (int i = 0; i < conn_count; i++)
    if (!dial(&conns[i])) die("port %d: %s", port, strerror(errno));
  if (hold) {
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &e);
    seconds = 3600;
    drain = 0;
  }

  uint64_t start = now_ns();
  window.begin = start + (uint64_t)(warmup * 1e9 + ramp_ms * 1e6);
  window.end = window.begin + (uint64_t)(seconds * 1e9);
  uint64_t hard_end = window.end + (uint64_t)(drain * 1e9);
  int asked = 0, said_held = 0;
  for (;;) {
    uint64_t now = now_ns();
    while (asked < conn_count && (double)(now - start) >= ramp_ms * 1e6 / conn_count * asked) ask(&conns[asked++]);
    if (now >= window.end) stopping = 1;
    if (stopping && (!in_flight || hold || now > hard_end)) break;
    struct epoll_event ready[512];
    int n = epoll_wait(epoll, ready, 512, asked < conn_count ? 1 : 20);
    for (int i = 0; i < n; i++) {
      conn *c = ready[i].data.ptr;
      char line[64];
      if (!c) stopping |= read(STDIN_FILENO, line, sizeof line) <= 0;
      else if (c->fd >= 0) {
        if (ready[i].events & EPOLLOUT) push(c);
        if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(c);
      }
    }
    if (hold && !said_held && held >= (size_t)conn_count) {
      said_held = 1;
      puts("held");
      fflush(stdout);
    }
  }
  run.unfinished = in_flight;
  report(hold ? (double)(now_ns() - window.begin) / 1e9 : seconds);
  return 0;
}
