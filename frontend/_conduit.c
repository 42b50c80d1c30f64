/* What the events of a flowing stream come to: bytes from an engine, looked at, counted, and sent to the client. Whatever
   is out of the ordinary is handed back untouched to those whose business it is (conduit.py). tests/frontend/test_conduit.py

   A few hundred streams in turn push each other out of the caches, so that an event costs what memory it touches and not
   what is computed: here it touches one object, of two cache lines, and its own bytes. */

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
enum { READ_BYTES = 64 * 1024 };
enum { MOST_DIGITS = 7 }; /* of a chunk's size */
enum { STEP = 82, CHUNK = 0 }; /* broker/wire.py */
enum { DELTA_BYTES = 6 }; /* the shortest there is */

typedef struct {
    PyObject_HEAD
    int client;    /* the socket of the client; NONE: it is gone */
    int engine;    /* the socket that the intake reads; NONE: it does not */
    uint64_t next; /* number of the delta that is due */
    double touched;
    Py_ssize_t size, events;
    PyObject *last, *tail; /* what was sent last, and before it, with its frame; or NULL */
    PyObject *owner;       /* who is told that the intake has done with it; NULL: it has */
} Conduit;

/* -- what comes ------------------------------------------------------------------------------------------------------ */

/* Events in the body of a chunk, as frontend/forward.py counts them. */
static Py_ssize_t events_in(const char *data, Py_ssize_t size) {
    if (size >= 7 && !memcmp(data, "data:", 5) && !memchr(data, '\n', (size_t)size - 2)) return 1; /* nearly all */
    Py_ssize_t found = 0;
    for (const char *at = data, *end = data + size; (at = memmem(at, (size_t)(end - at), "data:", 5)); at += 5) found++;
    return found;
}

/* Of bytes that are whole chunks of HTTP's chunked coding, without extensions and none of them the last: what is in
   them. False: they are not. */
static int chunks_in(const char *data, Py_ssize_t length, Py_ssize_t *size, Py_ssize_t *events) {
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
        *size += bytes;
        *events += events_in(at + 2, bytes);
        at += bytes + 4;
    }
    return length > 0;
}

static void note(Conduit *to, PyObject *sent, Py_ssize_t size, Py_ssize_t events, double now) {
    to->touched = now;
    to->size += size;
    to->events += events;
    PyObject *forgotten = to->tail;
    to->tail = to->last;
    to->last = sent;
    Py_XDECREF(forgotten); /* bytes: nothing is called */
}

/* Sends what was noted last. Returns what the socket does not take, or NULL: nothing, or (an exception is set) no memory
   for it. Errors are the transport's to meet. */
static PyObject *send_last(Conduit *to) {
    if (to->client == NONE) return NULL;
    Py_ssize_t length = PyBytes_GET_SIZE(to->last);
    ssize_t sent = send(to->client, PyBytes_AS_STRING(to->last), (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == length) return NULL;
    if (sent < 0) sent = 0;
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(to->last) + sent, length - sent);
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
    Py_XDECREF(self->last);
    Py_XDECREF(self->tail);
    Py_XDECREF(self->owner);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *conduit_close(Conduit *self, PyObject *Py_UNUSED(nothing)) {
    self->client = NONE;
    Py_RETURN_NONE;
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
    {"last", T_OBJECT, offsetof(Conduit, last), READONLY, NULL},
    {"tail", T_OBJECT, offsetof(Conduit, tail), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject ConduitType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Conduit",
    .tp_basicsize = sizeof(Conduit),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = conduit_new,
    .tp_dealloc = (destructor)conduit_dealloc,
    .tp_methods = conduit_methods,
    .tp_members = conduit_members,
};

/* -- Intake: HTTP engines -------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    int epoll;
    PyObject *joined; /* a set: keeps alive what the kernel has the addresses of */
    char *read;
} Intake;

static PyObject *intake_new(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(named)) {
    Intake *self = (Intake *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    self->joined = PySet_New(NULL);
    self->read = PyMem_RawMalloc(READ_BYTES);
    if (self->epoll == NONE) PyErr_SetFromErrno(PyExc_OSError);
    else if (!self->read) PyErr_NoMemory();
    if (PyErr_Occurred()) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void intake_dealloc(Intake *self) {
    if (self->epoll != NONE) close(self->epoll);
    Py_XDECREF(self->joined);
    PyMem_RawFree(self->read);
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

/* Takes a conduit out, to be told of when the turn is over. */
static int part_with(Intake *self, Conduit *conduit, PyObject **parted, const char *read, Py_ssize_t size, PyObject *unsent) {
    if (!*parted && !(*parted = PyList_New(0))) return -1;
    PyObject *owner = part(self, conduit);
    PyObject *told = unsent ? Py_BuildValue("(Ny#O)", owner, read, size, unsent)
                            : Py_BuildValue("(Ny#y)", owner, read, size, "");
    int failed = !told || PyList_Append(*parted, told);
    Py_XDECREF(told);
    return failed ? -1 : 0;
}

/* Reads up to MOST engines, then sends to as many clients. Returns how many had something, or -1. */
static int a_round(Intake *self, double now, PyObject **parted) {
    struct epoll_event found[MOST];
    Conduit *ready[MOST];
    char ends[MOST];
    int many = 0, count = epoll_wait(self->epoll, found, MOST, 0);
    for (int i = 0; i < count; i++) {
        Conduit *conduit = found[i].data.ptr;
        int end = (found[i].events & ~(uint32_t)EPOLLIN) != 0;
        ssize_t got = recv(conduit->engine, self->read, READ_BYTES, MSG_DONTWAIT);
        if (got < 0 && !end && (errno == EAGAIN || errno == EINTR)) continue; /* nothing, after all */
        Py_ssize_t size = 0, events = 0;
        if (got > 0 && got < READ_BYTES && chunks_in(self->read, got, &size, &events)) {
            PyObject *chunk = PyBytes_FromStringAndSize(self->read, got);
            if (!chunk) return -1;
            note(conduit, chunk, size, events, now);
            ends[many] = (char)end;
            ready[many++] = conduit;
        } else if (part_with(self, conduit, parted, self->read, got < 0 ? 0 : got, NULL)) {
            return -1;
        }
    }
    for (int i = 0; i < many; i++) {
        PyObject *unsent = send_last(ready[i]);
        if (!unsent && PyErr_Occurred()) return -1;
        int failed = (unsent || ends[i]) && part_with(self, ready[i], parted, "", 0, unsent);
        Py_XDECREF(unsent);
        if (failed) return -1;
    }
    return count;
}

static PyObject *intake_turn(Intake *self, PyObject *time) {
    double now = PyFloat_AsDouble(time);
    if (now == -1 && PyErr_Occurred()) return NULL;
    PyObject *parted = NULL;
    int count = MOST;
    for (int i = 0; i < ROUNDS && count == MOST; i++) {
        count = a_round(self, now, &parted);
        if (PyErr_Occurred()) {
            Py_XDECREF(parted);
            return NULL;
        }
    }
    if (parted) return parted;
    Py_RETURN_NONE;
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

/* The data as a chunk of HTTP's chunked coding. */
static PyObject *framed(const char *data, Py_ssize_t size) {
    char line[2 * sizeof(Py_ssize_t) + 2], *at = line + sizeof line;
    *--at = '\n';
    *--at = '\r';
    for (Py_ssize_t left = size; left; left >>= 4) *--at = "0123456789abcdef"[left & 15];
    Py_ssize_t digits = line + sizeof line - at;
    PyObject *chunk = PyBytes_FromStringAndSize(NULL, digits + size + 2);
    if (chunk) {
        char *to = PyBytes_AS_STRING(chunk);
        memcpy(to, at, (size_t)digits);
        memcpy(to + digits, data, (size_t)size);
        memcpy(to + digits + size, "\r\n", 2);
    }
    return chunk;
}

static int append(PyObject **list, PyObject *item) {
    if (item && !*list) *list = PyList_New(0);
    int failed = !item || !*list || PyList_Append(*list, item);
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

/* One delta to its client, or among the others. */
static int pass_to(Conduit *to, PyObject *id, const Delta *delta, PyObject *conduits, double now, PyObject **others,
                   PyObject **unsent) {
    if (!to || !Py_IS_TYPE(to, &ConduitType) || delta->kind != CHUNK || delta->sequence != to->next || !delta->size) {
        return append(others, Py_BuildValue("(OKKy#)", id, (unsigned long long)delta->sequence,
                                            (unsigned long long)delta->kind, delta->data, delta->size));
    }
    PyObject *chunk = framed(delta->data, delta->size);
    if (!chunk) return -1;
    to->next++;
    note(to, chunk, delta->size, events_in(delta->data, delta->size), now);
    PyObject *rest = send_last(to);
    if (!rest) return PyErr_Occurred() ? -1 : 0;
    /* There may be another delta for it, and that must not overtake the rest of this one. */
    if (PyDict_DelItem(conduits, id)) {
        Py_DECREF(rest);
        return -1;
    }
    return append(unsent, Py_BuildValue("(ON)", id, rest));
}

static int pass(const Delta *delta, PyObject *conduits, double now, PyObject **others, PyObject **unsent) {
    PyObject *id = PyLong_FromUnsignedLongLong(delta->id);
    if (!id) return -1;
    PyObject *to = Py_XNewRef(PyDict_GetItemWithError(conduits, id));
    int failed = !to && PyErr_Occurred() ? -1 : pass_to((Conduit *)to, id, delta, conduits, now, others, unsent);
    Py_XDECREF(to);
    Py_DECREF(id);
    return failed;
}

static PyObject *step(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Py_buffer frame;
    PyObject *incarnation, *conduits, *others = NULL, *unsent = NULL, *found = NULL;
    double now;
    if (!PyArg_ParseTuple(arguments, "y*O!O!d", &frame, &PyBytes_Type, &incarnation, &PyDict_Type, &conduits, &now)) {
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
    return PyModule_AddType(module, &ConduitType) || PyModule_AddType(module, &IntakeType) ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, execute}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "frontend._conduit", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__conduit(void) {
    return PyModuleDef_Init(&module);
}
