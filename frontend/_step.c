/* The steps of native engines: each delta to its client. _conduit.h says what it is for. */

#include "_conduit.h"

enum { STEP = 82, CHUNK = 0 }; /* broker/wire.py */
enum { DELTA_BYTES = 6 };      /* the shortest there is */
enum { LINE_BYTES = 2 * sizeof(Py_ssize_t) + 2 }; /* a chunk's size, at the most */

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

PyTypeObject ConduitsType = {
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

PyObject *step(PyObject *Py_UNUSED(module), PyObject *arguments) {
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
