// http_engine.c - a fake OpenAI-style engine over HTTP/1.1, for measuring routers.
//
//   http_engine --port 18001 --engines 4          listens on 4 ports in a row; one thread, epoll
//
// POST /v1/chat/completions and /v1/completions are answered by a fixed JSON of about 600 bytes or, when the body
// holds "stream": true, by SSE in chunked coding: one send() an event, never two events in one, then [DONE].
// The usual GET routes (/health, /metrics, /v1/models, ...) answer what routers want to see before they start.
// One process for several engines, so that K engines cost no context switches between them. See control.h.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "answers.h"
#include "common.h"
#include "control.h"
#include "timers.h"

#define MAX_FILES 65536
#define MAX_ENGINES 64

typedef struct {
  timer next;  // the next token; first member, so that a timer is its connection
  int fd, engine, kind, left, wants_out;
  size_t whole;  // bytes of the request being read, once its header has been seen; 0 = not yet
  buffer in, out;
} conn;

static int epoll, listener_engine[MAX_FILES];
static conn *conns[MAX_FILES];
static int running[MAX_ENGINES];
static schedule plan = {.events = 64};
static counts total;

// -- answers --------------------------------------------------------------------------------------------------

static buffer answer[2], event[2], stream_head, stream_end;

__attribute__((format(printf, 2, 3))) static void add_text(buffer *b, const char *format, ...) {
  char text[8192];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  buffer_add(b, text, (size_t)n);
}

static void add_response(buffer *b, const char *status, const char *type, const char *body, size_t length) {
  add_text(b, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n", status, type, length);
  buffer_add(b, body, length);
}

static void add_chunk(buffer *b, bytes data) {
  add_text(b, "%zx\r\n", data.length);
  buffer_add(b, data.data, data.length);
  buffer_add(b, "\r\n", 2);
}

static void prepare_answers(void) {
  for (int kind = 0; kind < 2; kind++) {
    add_response(&answer[kind], "200 OK", "application/json", ANSWER[kind].data, ANSWER[kind].length);
    add_chunk(&event[kind], EVENT[kind]);
  }
  add_text(&stream_head, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                         "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n");
  add_chunk(&stream_end, LAST_EVENT);
  buffer_add(&stream_end, "0\r\n\r\n", 5);
}

// -- connections ----------------------------------------------------------------------------------------------

static void close_conn(conn *c) {
  if (c->left) running[c->engine]--, total.aborted++;
  timer_stop(&c->next);
  conns[c->fd] = NULL;
  close(c->fd);
  free(c->in.data);
  free(c->out.data);
  free(c);
}

static void watch(conn *c, int wants_out) {
  if (c->wants_out == wants_out) return;
  c->wants_out = wants_out;
  struct epoll_event e = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.fd = c->fd};
  epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
}

// False: the connection is gone.
static int put(conn *c, const buffer *b) {
  const char *data = buffer_head(b);
  size_t n = b->length;
  if (!c->out.length) {
    ssize_t sent = send(c->fd, data, n, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) {
      close_conn(c);
      return 0;
    }
    if (sent > 0) data += sent, n -= (size_t)sent;
    if (!n) return 1;
  }
  buffer_add(&c->out, data, n);
  watch(c, 1);
  return 1;
}

static int put_rest(conn *c) {
  ssize_t sent = send(c->fd, buffer_head(&c->out), c->out.length, MSG_NOSIGNAL);
  if (sent < 0 && errno != EAGAIN && errno != EINTR) {
    close_conn(c);
    return 0;
  }
  if (sent > 0) buffer_consume(&c->out, (size_t)sent);
  if (!c->out.length) watch(c, 0);
  return 1;
}

// -- requests -------------------------------------------------------------------------------------------------

static int wants_stream(const char *body, size_t n) {
  static const char name[] = "\"stream\"";
  const char *end = body + n;
  for (const char *p = body; (p = memmem(p, (size_t)(end - p), name, sizeof name - 1));) {
    p += sizeof name - 1;
    while (p < end && (*p == ' ' || *p == ':')) p++;
    if (end - p >= 4 && !memcmp(p, "true", 4)) return 1;
  }
  return 0;
}

// One token, and the end after the last one. False: the connection is gone.
static int put_token(conn *c) {
  total.events++;
  if (!put(c, &event[c->kind])) return 0;
  if (--c->left) return 1;
  running[c->engine]--;
  timer_stop(&c->next);
  return put(c, &stream_end);
}

static int infer(conn *c, int kind, const char *body, size_t n) {
  total.requests++;
  if (!wants_stream(body, n)) return put(c, &answer[kind]);
  total.streams++;
  c->kind = kind;
  c->left = plan.events;
  running[c->engine]++;
  if (!put(c, &stream_head)) return 0;
  if (plan.interval_ns) {
    timer_start(&c->next, first_due(&plan, now_ns()));
    return 1;
  }
  while (c->left)
    if (!put_token(c)) return 0;
  return 1;
}

static const struct {
  const char *path, *body;
} PAGES[] = {
    {"/health", "{\"status\":\"ok\"}"},
    {"/v1/models", "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":1700000000,"
                   "\"owned_by\":\"mock\",\"root\":\"mock\",\"max_model_len\":32768}]}"},
    {"/get_model_info", "{\"model_path\":\"mock\",\"tokenizer_path\":\"mock\",\"is_generation\":true,"
                        "\"served_model_name\":\"mock\",\"model_type\":\"mock\"}"},
    {"/get_server_info", "{\"model_path\":\"mock\",\"served_model_name\":\"mock\",\"tokenizer_path\":\"mock\","
                         "\"tp_size\":1,\"dp_size\":1,\"version\":\"0.0.mock\",\"max_total_tokens\":1000000,"
                         "\"max_prefill_tokens\":16384,\"max_running_requests\":8192,"
                         "\"disaggregation_mode\":\"null\",\"internal_states\":[]}"},
    {"/version", "{\"version\":\"0.0.mock\"}"},
};

static void add_metrics(buffer *page, int engine) {
  static const char *const names[][2] = {
      {"vllm:num_requests_running", "vllm:num_requests_waiting"},
      {"sglang:num_running_reqs", "sglang:num_queue_reqs"},
      {"fastdeploy:num_requests_running", "fastdeploy:num_requests_waiting"},
  };
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    add_text(page, "# TYPE %s gauge\n%s{model_name=\"mock\"} %d.0\n# TYPE %s gauge\n%s{model_name=\"mock\"} 0.0\n",
             names[i][0], names[i][0], running[engine], names[i][1], names[i][1]);
}

static int show_page(conn *c, const char *path, size_t length) {
  static buffer response, page;
  response.length = page.length = 0;
  const char *status = "200 OK", *type = "application/json";
  if (length == 8 && !memcmp(path, "/metrics", 8)) {
    type = "text/plain; version=0.0.4";
    add_metrics(&page, c->engine);
  } else if (length == 9 && !memcmp(path, "/get_load", 9)) {
    add_text(&page, "[{\"dp_rank\":0,\"num_reqs\":%d,\"num_waiting_reqs\":0,\"num_tokens\":%d}]", running[c->engine],
             running[c->engine] * 250);
  } else {
    for (size_t i = 0; i < sizeof PAGES / sizeof *PAGES; i++)
      if (strlen(PAGES[i].path) == length && !memcmp(path, PAGES[i].path, length)) add_text(&page, "%s", PAGES[i].body);
    if (!page.length) {
      status = "404 Not Found";
      add_text(&page, "{}");
    }
  }
  add_response(&response, status, type, buffer_head(&page), page.length);
  return put(c, &response);
}

// -- reading --------------------------------------------------------------------------------------------------

// The value of a header, or NULL. `head` starts at the request line and ends before the blank line.
static const char *header(const char *head, size_t n, const char *name) {
  size_t length = strlen(name);
  const char *end = head + n;
  for (const char *p = memchr(head, '\n', n); p; p = memchr(p, '\n', (size_t)(end - p))) {
    p++;
    if ((size_t)(end - p) > length && p[length] == ':' && !strncasecmp(p, name, length)) {
      for (p += length + 1; p < end && *p == ' ';) p++;
      return p;
    }
  }
  return NULL;
}

// Joins the chunks of a body in place. 0: it has not all come yet; else the bytes it took on the wire.
static size_t join_chunks(char *body, size_t n, size_t *joined) {
  char *end = body + n, *from = body, *to = body;
  for (char *p = body;;) {  // is it whole?
    char *line = memchr(p, '\n', (size_t)(end - p));
    if (!line) return 0;
    size_t size = strtoul(p, NULL, 16);
    if ((size_t)(end - line - 1) < size + 2) return 0;
    p = line + 1 + size + 2;
    if (!size) break;
  }
  for (;;) {
    size_t size = strtoul(from, NULL, 16);
    from = (char *)memchr(from, '\n', (size_t)(end - from)) + 1;
    if (!size) break;
    memmove(to, from, size);
    to += size;
    from += size + 2;
  }
  *joined = (size_t)(to - body);
  return (size_t)(from + 2 - body);
}

// Answers the requests that are whole. False: the connection is gone.
static int understand(conn *c) {
  while (c->in.length && !c->left) {  // what is pipelined behind a stream waits for its end
    if (c->in.length < c->whole) return 1;
    char *head = buffer_head(&c->in);
    char *blank = memmem(head, c->in.length, "\r\n\r\n", 4);
    if (!blank) return 1;
    size_t head_length = (size_t)(blank + 2 - head), body_length = 0, taken = head_length + 2;
    char *body = blank + 4;
    const char *value = header(head, head_length, "content-length");
    if (value) {
      body_length = strtoul(value, NULL, 10);
      c->whole = taken += body_length;
      if (c->in.length < c->whole) return 1;
    } else if ((value = header(head, head_length, "transfer-encoding")) && !strncasecmp(value, "chunked", 7)) {
      size_t wire = join_chunks(body, c->in.length - taken, &body_length);
      if (!wire) return 1;
      taken += wire;
    }
    c->whole = 0;
    const char *path = memchr(head, ' ', head_length);
    const char *end = path ? memchr(path + 1, ' ', (size_t)(head + head_length - path - 1)) : NULL;
    if (!end) {
      close_conn(c);
      return 0;
    }
    path++;
    int kind = *head == 'P' ? kind_of_path(path, (size_t)(end - path)) : -1;
    int alive = kind >= 0 ? infer(c, kind, body, body_length) : show_page(c, path, (size_t)(end - path));
    if (!alive) return 0;
    buffer_consume(&c->in, taken);
  }
  return 1;
}

static void on_readable(conn *c) {
  size_t want = c->whole > c->in.length ? c->whole - c->in.length : 4096;
  ssize_t n = recv(c->fd, buffer_reserve(&c->in, want), want, 0);
  if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
    close_conn(c);
  } else if (n > 0) {
    c->in.length += (size_t)n;
    understand(c);
  }
}

static void on_connect(int listener) {
  for (int i = 0; i < 64; i++) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    conn *c = calloc(1, sizeof *c);
    if (!c || fd >= MAX_FILES) die("too many connections");
    c->fd = fd;
    c->engine = listener_engine[listener] - 1;
    c->next.place = -1;
    conns[fd] = c;
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
  }
}

static void run_timers(void) {
  for (uint64_t now = now_ns(); timer_count && timers[0]->due <= now;) {
    conn *c = (conn *)timers[0];
    if (!put_token(c)) continue;
    if (c->left) timer_again(&c->next, c->next.due + plan.interval_ns);
    else understand(c);
  }
}

static void listen_on(int port, int engine) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8192)) die("port %d: %s", port, strerror(errno));
  listener_engine[fd] = engine + 1;
  struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
}

int main(int argc, char **argv) {
  int port = 18001, engines = 1;
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 < argc && !strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
    else if (i + 1 < argc && !strcmp(argv[i], "--engines")) engines = atoi(argv[i + 1]);
    else die("usage: http_engine [--port P] [--engines 1..%d]", MAX_ENGINES);
  }
  if (engines < 1 || engines > MAX_ENGINES) die("--engines must be 1..%d", MAX_ENGINES);
  signal(SIGPIPE, SIG_IGN);
  raise_file_limit();
  prepare_answers();
  epoll = epoll_create1(EPOLL_CLOEXEC);
  for (int i = 0; i < engines; i++) listen_on(port + i, i);
  control_open();
  struct epoll_event e = {.events = EPOLLIN, .data.fd = STDIN_FILENO};
  epoll_ctl(epoll, EPOLL_CTL_ADD, STDIN_FILENO, &e);

  static struct epoll_event ready[1024];
  for (;;) {
    struct timespec wait = {0};
    if (timer_count) {
      uint64_t now = now_ns(), due = timers[0]->due;
      uint64_t ns = due > now ? due - now : 0;
      wait = (struct timespec){.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
    }
    int n = epoll_pwait2(epoll, ready, 1024, timer_count ? &wait : NULL, NULL);
    for (int i = 0; i < n; i++) {
      int fd = ready[i].data.fd;
      if (fd == STDIN_FILENO) control_read(&plan, &total);
      else if (listener_engine[fd]) on_connect(fd);
      else {
        if (conns[fd] && ready[i].events & EPOLLOUT && conns[fd]->out.length) put_rest(conns[fd]);
        if (conns[fd] && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(conns[fd]);
      }
    }
    run_timers();
  }
}
