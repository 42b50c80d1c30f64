/* What the events of a flowing stream come to: bytes from an engine, looked at, counted, and sent to the client. Whatever
   is out of the ordinary is handed back untouched to those whose business it is (conduit.py). tests/frontend/test_conduit.py

   A few hundred streams in turn push each other out of the caches, so that an event costs what memory it touches and not
   what is computed: here it touches one object of a line or two, and buffers that all events share. */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { NONE = -1 };
enum { MOST = 64, ROUNDS = 4 }; /* as many are read before the first is sent on (outbox.py); rounds of it in a turn */
enum { READ_BYTES = 64 * 1024, ARENA_BYTES = 4 * READ_BYTES };
enum { MOST_DIGITS = 7 };       /* of a chunk's size */
enum { STEP = 82, CHUNK = 0 };  /* broker/wire.py */
enum { DELTA_BYTES = 6 };       /* the shortest there is */
enum { LINE_BYTES = 2 * sizeof(Py_ssize_t) + 2 }; /* a chunk's size, at the most */
enum { ENDING = 4 };
static const char USAGE[] = "\"completion_tokens\"";
enum { USAGE_BYTES = sizeof USAGE - 1, USAGE_LINE = 11 }; /* the latter: where its `_` is, which is rare in texts */
enum { USAGE_WITHIN = 2048 };                            /* of the last bytes, as frontend/account.py looks for it */

/* The last bytes of a body. */
typedef struct {
    char bytes[ENDING];
    unsigned char many;
} Ending;

typedef struct {
    PyObject_HEAD
    int client;    /* the socket of the client; NONE: it is gone */
    int engine;    /* the socket that the intake reads; NONE: it does not */
    uint64_t next; /* number of the delta that is due */
    double touched;
    Py_ssize_t size, events;
    Ending ending;
    unsigned char age; /* of the usage: how many things were sent after it */
    PyObject *usage;   /* bytes in which the engine says it, or NULL */
    PyObject *owner;   /* who is told that the intake has done with it; NULL: it has */
} Conduit;

/* -- what comes ------------------------------------------------------------------------------------------------------ */

/* Events in the body of a chunk, as frontend/forward.py counts them. */
static Py_ssize_t events_in(const char *data, Py_ssize_t size) {
    if (size >= 7 && !memcmp(data, "data:", 5) && !memchr(data, '\n', (size_t)size - 2)) return 1; /* nearly all */
    Py_ssize_t found = 0;
    for (const char *at = data, *end = data + size; (at = memmem(at, (size_t)(end - at), "data:", 5)); at += 5) found++;
    return found;
}

static void end_with(Ending *ending, const char *data, Py_ssize_t size) {
    for (const char *at = size > ENDING ? data + size - ENDING : data; at < data + size; at++) {
        if (ending->many == ENDING) memmove(ending->bytes, ending->bytes + 1, ENDING - 1);
        else ending->many++;
        ending->bytes[ending->many - 1] = *at;
    }
}

/* What was read, as far as it is counted. */
typedef struct {
    Py_ssize_t size, events;
    Ending ending;
} Count;

/* Counts bytes that are whole chunks of HTTP's chunked coding, without extensions and none of them the last. False: they
   are not. */
static int count_chunks(const char *data, Py_ssize_t length, Count *count) {
    const char *at = data, *end = data + length;
    while (at < end) {
        Py_ssize_t bytes = 0;
        int digits = 0;
        for (; digits < MOST_DIGITS && at < end; at++, digits++) {
            unsigned char c = (unsigned char)*at, lower = c | 0x20;
            if (c >= '0' && c <= '9') bytes = bytes * 16 + (c - '0');
            else if (lower >= 'a' && lower <= 'f') bytes = bytes * 16 + (lower - 'a' + 10);
            else break;
        }
        if (!bytes || end - at < bytes + 4) return 0;
        if (memcmp(at, "\r\n", 2) || memcmp(at + 2 + bytes, "\r\n", 2)) return 0;
        count->size += bytes;
        count->events += events_in(at + 2, bytes);
        end_with(&count->ending, at + 2, bytes);
        at += bytes + 4;
    }
    return length > 0;
}

static int says_usage(const char *data, Py_ssize_t length) {
    const char *at = data, *end = data + length;
    for (; (at = memchr(at, USAGE[USAGE_LINE], (size_t)(end - at))); at++) {
        const char *begin = at - USAGE_LINE;
        if (begin >= data && end - begin >= USAGE_BYTES && !memcmp(begin, USAGE, USAGE_BYTES)) return 1;
    }
    return 0;
}

/* `data`: what the count is of. */
static void note(Conduit *to, const Count *count, const char *data, Py_ssize_t length, double now) {
    to->touched = now;
    to->size += count->size;
    to->events += count->events;
    to->ending = count->ending;
    Py_ssize_t within = length < USAGE_WITHIN ? length : USAGE_WITHIN;
    if (says_usage(data + length - within, within)) {
        Py_XSETREF(to->usage, PyBytes_FromStringAndSize(data + length - within, within));
        to->age = 0;
        if (!to->usage) PyErr_Clear(); /* no memory: the log line is without it */
    } else if (to->usage && ++to->age == 2) {
        Py_CLEAR(to->usage);
    }
}

/* Sends to the client. Returns how much its socket did not take; errors are the transport's to meet. */
static Py_ssize_t send_to(const Conduit *to, const char *data, Py_ssize_t length) {
    if (to->client == NONE) return 0;
    ssize_t sent = send(to->client, data, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
    return sent < 0 ? length : length - sent;
}

/* -- Conduit --------------------------------------------------------------------------------------------------------- */

static PyObject *conduit_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    static char *names[] = {"client", NULL};
    int client;
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "i", names, &client)) return NULL;
    Conduit *self = (Conduit *)type->tp_alloc(type, 0);
    if (self) {
        self->client = client;
        self->engine = NONE;
    }
    return (PyObject *)self;
}

static void conduit_dealloc(Conduit *self) {
    Py_XDECREF(self->usage);
    Py_XDECREF(self->owner);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *conduit_close(Conduit *self, PyObject *Py_UNUSED(nothing)) {
    self->client = NONE;
    Py_RETURN_NONE;
}

static PyObject *conduit_ending(Conduit *self, void *Py_UNUSED(nothing)) {
    return PyBytes_FromStringAndSize(self->ending.bytes, self->ending.many);
}

/* The usage, if it is that old. */
static PyObject *conduit_usage(Conduit *self, void *age) {
    int is_it = self->usage && self->age == (age != NULL);
    return is_it ? Py_NewRef(self->usage) : PyBytes_FromStringAndSize(NULL, 0);
}

static PyMethodDef conduit_methods[] = {
    {"close", (PyCFunction)conduit_close, METH_NOARGS, "See _conduit.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef conduit_members[] = {
    {"next", T_ULONGLONG, offsetof(Conduit, next), 0, NULL},
    {"touched", T_DOUBLE, offsetof(Conduit, touched), READONLY, NULL},
    {"size", T_PYSSIZET, offsetof(Conduit, size), READONLY, NULL},
    {"events", T_PYSSIZET, offsetof(Conduit, events), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef conduit_properties[] = {
    {"ending", (getter)conduit_ending, NULL, NULL, NULL},
    {"last", (getter)conduit_usage, NULL, NULL, NULL},
    {"tail", (getter)conduit_usage, NULL, NULL, ""},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject ConduitType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Conduit",
    .tp_basicsize = sizeof(Conduit),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = conduit_new,
    .tp_dealloc = (destructor)conduit_dealloc,
    .tp_methods = conduit_methods,
    .tp_members = conduit_members,
    .tp_getset = conduit_properties,
};

/* -- Intake: HTTP engines -------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    int epoll;
    PyObject *joined; /* a set: keeps alive what the kernel has the addresses of */
    char *arena;      /* what the engines of a round have said */
} Intake;

static PyObject *intake_new(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(named)) {
    Intake *self = (Intake *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->joined = PySet_New(NULL);
    self->arena = PyMem_RawMalloc(ARENA_BYTES);
    self->epoll = epoll_create1(EPOLL_CLOEXEC); /* last, for its errno */
    if (self->epoll == NONE) PyErr_SetFromErrno(PyExc_OSError);
    else if (!self->arena) PyErr_NoMemory();
    if (PyErr_Occurred()) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void intake_dealloc(Intake *self) {
    if (self->epoll != NONE) close(self->epoll);
    Py_XDECREF(self->joined);
    PyMem_RawFree(self->arena);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *intake_fileno(Intake *self, PyObject *Py_UNUSED(nothing)) {
    return PyLong_FromLong(self->epoll);
}

static Py_ssize_t intake_length(Intake *self) {
    return PySet_GET_SIZE(self->joined);
}

static PyObject *intake_join(Intake *self, PyObject *arguments) {
    Conduit *conduit;
    int engine;
    PyObject *owner;
    if (!PyArg_ParseTuple(arguments, "O!iO", &ConduitType, &conduit, &engine, &owner)) return NULL;
    if (conduit->engine != NONE) return PyErr_Format(PyExc_ValueError, "it has joined already");
    /* An edge is told once; a read that leaves room in the buffer has taken all that was there, and what comes later is
       another edge. */
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.ptr = conduit};
    if (PySet_Add(self->joined, (PyObject *)conduit)) return NULL;
    if (epoll_ctl(self->epoll, EPOLL_CTL_ADD, engine, &wanted)) {
        if (PySet_Discard(self->joined, (PyObject *)conduit) < 0) return NULL;
        Py_RETURN_FALSE;
    }
    conduit->engine = engine;
    conduit->owner = Py_NewRef(owner);
    Py_RETURN_TRUE;
}

/* Takes a conduit out. Returns its owner, or NULL: it was out. */
static PyObject *part(Intake *self, Conduit *conduit) {
    PyObject *owner = conduit->owner;
    if (conduit->engine != NONE) {
        (void)epoll_ctl(self->epoll, EPOLL_CTL_DEL, conduit->engine, NULL);
        conduit->engine = NONE;
        conduit->owner = NULL;
        (void)PySet_Discard(self->joined, (PyObject *)conduit); /* identities: no error is possible */
    }
    return owner;
}

static PyObject *intake_leave(Intake *self, PyObject *conduit) {
    if (!Py_IS_TYPE(conduit, &ConduitType)) return PyErr_Format(PyExc_TypeError, "leave(conduit)");
    Py_INCREF(conduit);
    PyObject *owner = part(self, (Conduit *)conduit);
    Py_DECREF(conduit);
    Py_XDECREF(owner);
    Py_RETURN_NONE;
}

/* What one of them said, on its way to the client. */
typedef struct {
    Conduit *conduit;
    const char *data;
    Py_ssize_t length;
} Passing;

/* One that has been taken out, and why. */
typedef struct {
    PyObject *owner, *read, *unsent; /* the latter two may be NULL: no memory */
} Parted;

/* Reads up to MOST engines, then sends to as many clients. Returns how many had something. What is no conduit's business
   is `parted`. Nothing that the garbage collector knows is made here: it might call what makes a conduit leave. */
static int a_round(Intake *self, double now, Parted *parted, int *partings) {
    struct epoll_event found[MOST];
    Passing passing[MOST];
    int count = epoll_wait(self->epoll, found, MOST, 0);
    for (int i = 0; i < count;) {
        int many = 0;
        char *at = self->arena, *end = self->arena + ARENA_BYTES;
        for (; i < count && end - at >= READ_BYTES; i++) {
            Conduit *conduit = found[i].data.ptr;
            /* An error is told once, and has to be told to the transport: it reads whatever is left of an engine that ends. */
            ssize_t got = found[i].events == EPOLLIN ? recv(conduit->engine, at, READ_BYTES, MSG_DONTWAIT) : 0;
            if (got < 0 && errno == EAGAIN) continue; /* nothing, after all */
            Count counted = {0, 0, conduit->ending};
            if (got > 0 && got < READ_BYTES && count_chunks(at, got, &counted)) {
                note(conduit, &counted, at, got, now);
                passing[many++] = (Passing){conduit, at, got};
                at += got;
            } else {
                PyObject *read = PyBytes_FromStringAndSize(at, got < 0 ? 0 : got);
                parted[(*partings)++] = (Parted){part(self, conduit), read, PyBytes_FromStringAndSize(NULL, 0)};
            }
        }
        for (Passing *to = passing; to < passing + many; to++) {
            Py_ssize_t left = send_to(to->conduit, to->data, to->length);
            if (left) {
                PyObject *unsent = PyBytes_FromStringAndSize(to->data + to->length - left, left);
                parted[(*partings)++] = (Parted){part(self, to->conduit), PyBytes_FromStringAndSize(NULL, 0), unsent};
            }
        }
    }
    return count;
}

static PyObject *intake_turn(Intake *self, PyObject *time) {
    double now = PyFloat_AsDouble(time);
    if (now == -1 && PyErr_Occurred()) return NULL;
    PyObject *told = NULL;
    int failed = 0;
    for (int i = 0, count = MOST; i < ROUNDS && count == MOST && !failed; i++) {
        Parted parted[MOST];
        int partings = 0;
        count = a_round(self, now, parted, &partings);
        if (partings && !told) failed = !(told = PyList_New(0));
        for (Parted *one = parted; one < parted + partings; one++) {
            PyObject *all = failed || !one->read || !one->unsent ? NULL : PyTuple_Pack(3, one->owner, one->read, one->unsent);
            failed = !all || PyList_Append(told, all);
            Py_XDECREF(all);
            Py_XDECREF(one->owner);
            Py_XDECREF(one->read);
            Py_XDECREF(one->unsent);
        }
    }
    if (failed) {
        Py_XDECREF(told);
        return NULL;
    }
    return told ? told : Py_NewRef(Py_None);
}

static PyMethodDef intake_methods[] = {
    {"fileno", (PyCFunction)intake_fileno, METH_NOARGS, "See _conduit.pyi."},
    {"join", (PyCFunction)intake_join, METH_VARARGS, "See _conduit.pyi."},
    {"leave", (PyCFunction)intake_leave, METH_O, "See _conduit.pyi."},
    {"turn", (PyCFunction)intake_turn, METH_O, "See _conduit.pyi."},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods intake_sequence = {.sq_length = (lenfunc)intake_length};

static PyTypeObject IntakeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Intake",
    .tp_basicsize = sizeof(Intake),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = intake_new,
    .tp_dealloc = (destructor)intake_dealloc,
    .tp_methods = intake_methods,
    .tp_as_sequence = &intake_sequence,
};

/* -- Conduits: by the numbers of native requests --------------------------------------------------------------------- */

/* An open table, at most half full: each number at the first free place from its own on. */
typedef struct {
    uint64_t id;
    Conduit *conduit; /* NULL: the place is free */
} Entry;

typedef struct {
    PyObject_HEAD
    Entry *entries;
    size_t places, used; /* the former is a power of two, or 0 */
} Conduits;

/* Where the number is, or would be; there is a free place. */
static Entry *find(const Conduits *self, uint64_t id) {
    size_t at = id & (self->places - 1);
    while (self->entries[at].conduit && self->entries[at].id != id) at = (at + 1) & (self->places - 1);
    return &self->entries[at];
}

static int grow(Conduits *self) {
    Conduits grown = {.places = self->places ? 2 * self->places : 16};
    grown.entries = PyMem_Calloc(grown.places, sizeof(Entry));
    if (!grown.entries) return -1;
    for (size_t i = 0; i < self->places; i++) {
        if (self->entries[i].conduit) *find(&grown, self->entries[i].id) = self->entries[i];
    }
    PyMem_Free(self->entries);
    self->entries = grown.entries;
    self->places = grown.places;
    return 0;
}

static void discard(Conduits *self, uint64_t id) {
    Entry *entry = self->places ? find(self, id) : NULL;
    if (!entry || !entry->conduit) return;
    Conduit *gone = entry->conduit;
    self->used--;
    /* Those behind it may have wanted its place. */
    size_t mask = self->places - 1, free = (size_t)(entry - self->entries);
    for (size_t at = (free + 1) & mask; self->entries[at].conduit; at = (at + 1) & mask) {
        if (((at - self->entries[at].id) & mask) >= ((at - free) & mask)) {
            self->entries[free] = self->entries[at];
            free = at;
        }
    }
    self->entries[free].conduit = NULL;
    Py_DECREF(gone);
}

static PyObject *conduits_add(Conduits *self, PyObject *arguments) {
    unsigned long long id;
    Conduit *conduit;
    if (!PyArg_ParseTuple(arguments, "KO!", &id, &ConduitType, &conduit)) return NULL;
    if (2 * (self->used + 1) > self->places && grow(self)) return PyErr_NoMemory();
    Entry *entry = find(self, id);
    if (!entry->conduit) self->used++;
    Py_INCREF(conduit);
    Conduit *old = entry->conduit;
    *entry = (Entry){id, conduit};
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

static PyObject *conduits_discard(Conduits *self, PyObject *id) {
    unsigned long long number = PyLong_AsUnsignedLongLong(id);
    if (number == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    discard(self, number);
    Py_RETURN_NONE;
}

static Py_ssize_t conduits_length(Conduits *self) {
    return (Py_ssize_t)self->used;
}

static void conduits_dealloc(Conduits *self) {
    for (size_t i = 0; i < self->places; i++) Py_XDECREF(self->entries[i].conduit);
    PyMem_Free(self->entries);
    Py_TYPE(self)->tp_free(self);
}

static PyMethodDef conduits_methods[] = {
    {"add", (PyCFunction)conduits_add, METH_VARARGS, "See _conduit.pyi."},
    {"discard", (PyCFunction)conduits_discard, METH_O, "See _conduit.pyi."},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods conduits_sequence = {.sq_length = (lenfunc)conduits_length};

static PyTypeObject ConduitsType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Conduits",
    .tp_basicsize = sizeof(Conduits),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)conduits_dealloc,
    .tp_methods = conduits_methods,
    .tp_as_sequence = &conduits_sequence,
};

/* -- step: native engines -------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t id, sequence, kind;
    const char *data;
    Py_ssize_t size;
} Delta;

typedef struct {
    const unsigned char *at, *end;
} Bytes;

/* So many bytes of an unsigned number, the highest first. */
static int number(Bytes *from, int bytes, uint64_t *value) {
    if (from->end - from->at < bytes) return 0;
    for (*value = 0; bytes; bytes--) *value = *value << 8 | *from->at++;
    return 1;
}

/* MessagePack, as far as engines' libraries write it for a step without errors; False: it is something else. */
static int read_number(Bytes *from, uint64_t *value) {
    if (from->at == from->end) return 0;
    unsigned char kind = *from->at++;
    if (kind < 0x80) {
        *value = kind;
        return 1;
    }
    return kind >= 0xcc && kind <= 0xcf && number(from, 1 << (kind - 0xcc), value);
}

static int read_array(Bytes *from, uint64_t *length) {
    if (from->at == from->end) return 0;
    unsigned char kind = *from->at++;
    if ((kind & 0xf0) == 0x90) {
        *length = kind & 0x0f;
        return 1;
    }
    return (kind == 0xdc || kind == 0xdd) && number(from, kind == 0xdc ? 2 : 4, length);
}

static int read_bytes(Bytes *from, const char **data, Py_ssize_t *size) {
    uint64_t length;
    if (from->at == from->end) return 0;
    unsigned char kind = *from->at++;
    if (kind < 0xc4 || kind > 0xc6 || !number(from, 1 << (kind - 0xc4), &length)) return 0;
    if ((uint64_t)(from->end - from->at) < length) return 0;
    *data = (const char *)from->at;
    *size = (Py_ssize_t)length;
    from->at += length;
    return 1;
}

/* The deltas of a step of this life of an engine; NULL: it is none, or not a plain one. To be freed. */
static Delta *deltas_of(Bytes frame, PyObject *incarnation, Py_ssize_t *count) {
    uint64_t length, tag;
    const char *life;
    Py_ssize_t size;
    if (!read_array(&frame, &length) || length != 3 || !read_number(&frame, &tag) || tag != STEP) return NULL;
    if (!read_bytes(&frame, &life, &size) || size != PyBytes_GET_SIZE(incarnation)) return NULL;
    if (memcmp(life, PyBytes_AS_STRING(incarnation), (size_t)size) || !read_array(&frame, &length)) return NULL;
    if (length > (uint64_t)(frame.end - frame.at) / DELTA_BYTES) return NULL;
    Delta *deltas = PyMem_RawMalloc((size_t)(length + 1) * sizeof(Delta));
    if (!deltas) return NULL;
    for (uint64_t i = 0; i < length; i++) {
        Delta *to = &deltas[i];
        uint64_t parts;
        if (!read_array(&frame, &parts) || parts != 4 || !read_number(&frame, &to->id) ||
            !read_number(&frame, &to->sequence) || !read_number(&frame, &to->kind) ||
            !read_bytes(&frame, &to->data, &to->size)) {
            PyMem_RawFree(deltas);
            return NULL;
        }
    }
    if (frame.at != frame.end) {
        PyMem_RawFree(deltas);
        return NULL;
    }
    *count = (Py_ssize_t)length;
    return deltas;
}

static int append(PyObject **list, PyObject *item) {
    if (item && !*list) *list = PyList_New(0);
    int failed = !item || !*list || PyList_Append(*list, item);
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

/* One delta to its client, or among the others. */
static int pass(const Delta *delta, Conduits *conduits, double now, PyObject **others, PyObject **unsent) {
    static char chunk[READ_BYTES]; /* under the GIL */
    Conduit *to = conduits->used ? find(conduits, delta->id)->conduit : NULL;
    Py_ssize_t size = delta->size;
    if (!to || delta->kind != CHUNK || delta->sequence != to->next || !size || size > READ_BYTES - LINE_BYTES - 2) {
        if (to) discard(conduits, delta->id); /* what may follow must not overtake this */
        return append(others, Py_BuildValue("(KKKy#)", (unsigned long long)delta->id, (unsigned long long)delta->sequence,
                                            (unsigned long long)delta->kind, delta->data, size));
    }
    char *end = chunk + LINE_BYTES, *at = end; /* the line in front, of as many digits as it takes */
    *--at = '\n';
    *--at = '\r';
    for (Py_ssize_t left = size; left; left >>= 4) *--at = "0123456789abcdef"[left & 15];
    memcpy(end, delta->data, (size_t)size);
    memcpy(end + size, "\r\n", 2);
    Count count = {size, events_in(end, size), to->ending};
    end_with(&count.ending, end, size);
    note(to, &count, end, size, now);
    to->next++;
    Py_ssize_t length = end + size + 2 - at, left = send_to(to, at, length);
    if (!left) return 0;
    discard(conduits, delta->id); /* nor the rest of this */
    return append(unsent, Py_BuildValue("(Ky#)", (unsigned long long)delta->id, at + length - left, left));
}

static PyObject *step(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Py_buffer frame;
    PyObject *incarnation, *others = NULL, *unsent = NULL, *found = NULL;
    Conduits *conduits;
    double now;
    if (!PyArg_ParseTuple(arguments, "y*O!O!d", &frame, &PyBytes_Type, &incarnation, &ConduitsType, &conduits, &now)) {
        return NULL;
    }
    Py_ssize_t count;
    Bytes all = {frame.buf, (const unsigned char *)frame.buf + frame.len};
    Delta *deltas = deltas_of(all, incarnation, &count);
    int failed = 0;
    if (deltas) {
        for (Py_ssize_t i = 0; i < count && !failed; i++) failed = pass(&deltas[i], conduits, now, &others, &unsent);
        PyMem_RawFree(deltas);
    }
    PyBuffer_Release(&frame);
    if (failed) found = NULL;
    else if (!deltas) found = Py_NewRef(Py_None);
    else if (!others && !unsent) found = PyTuple_New(0);
    else if ((others || (others = PyList_New(0))) && (unsent || (unsent = PyList_New(0)))) {
        found = PyTuple_Pack(2, others, unsent);
    }
    Py_XDECREF(others);
    Py_XDECREF(unsent);
    return found;
}

/* -- the module ------------------------------------------------------------------------------------------------------ */

static PyMethodDef methods[] = {
    {"step", step, METH_VARARGS, "See _conduit.pyi."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    int failed = PyModule_AddType(module, &ConduitType) || PyModule_AddType(module, &ConduitsType) ||
                 PyModule_AddType(module, &IntakeType);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, execute}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "frontend._conduit", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__conduit(void) {
    return PyModuleDef_Init(&module);
}
