/* The sockets of HTTP engines whose answers flow: read all together, and sent on. _conduit.h says what it is for. */

#include "_conduit.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 64, ROUNDS = 4 }; /* as many are read before the first is sent on (outbox.py); rounds of it in a turn */
enum { ARENA_BYTES = 4 * READ_BYTES };
enum { MOST_DIGITS = 7 }; /* of a chunk's size */

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

PyTypeObject IntakeType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Intake",
    .tp_basicsize = sizeof(Intake),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = intake_new,
    .tp_dealloc = (destructor)intake_dealloc,
    .tp_methods = intake_methods,
    .tp_as_sequence = &intake_sequence,
};
