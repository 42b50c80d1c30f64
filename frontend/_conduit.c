/* One stream, and the module. _conduit.h says what it is for. */

#include "_conduit.h"

#include <structmember.h>
#include <sys/socket.h>

static const char USAGE[] = "\"completion_tokens\"";
enum { USAGE_BYTES = sizeof USAGE - 1, USAGE_LINE = 11 }; /* the latter: where its `_` is, which is rare in texts */
enum { USAGE_WITHIN = 2048 };                            /* of the last bytes, as frontend/account.py looks for it */

Py_ssize_t events_in(const char *data, Py_ssize_t size) {
    if (size >= 7 && !memcmp(data, "data:", 5) && !memchr(data, '\n', (size_t)size - 2)) return 1; /* nearly all */
    Py_ssize_t found = 0;
    for (const char *at = data, *end = data + size; (at = memmem(at, (size_t)(end - at), "data:", 5)); at += 5) found++;
    return found;
}

void end_with(Ending *ending, const char *data, Py_ssize_t size) {
    if (size >= ENDING) {
        memcpy(ending->bytes, data + size - ENDING, ENDING);
        ending->many = ENDING;
        return;
    }
    for (const char *at = data; at < data + size; at++) {
        if (ending->many == ENDING) memmove(ending->bytes, ending->bytes + 1, ENDING - 1);
        else ending->many++;
        ending->bytes[ending->many - 1] = *at;
    }
}

static int says_usage(const char *data, Py_ssize_t length) {
    const char *at = data, *end = data + length;
    for (; (at = memchr(at, USAGE[USAGE_LINE], (size_t)(end - at))); at++) {
        const char *begin = at - USAGE_LINE;
        if (begin >= data && end - begin >= USAGE_BYTES && !memcmp(begin, USAGE, USAGE_BYTES)) return 1;
    }
    return 0;
}

void note(Conduit *to, const Count *count, const char *data, Py_ssize_t length, double now) {
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

Py_ssize_t send_to(const Conduit *to, const char *data, Py_ssize_t length) {
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

PyTypeObject ConduitType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "frontend._conduit.Conduit",
    .tp_basicsize = sizeof(Conduit),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = conduit_new,
    .tp_dealloc = (destructor)conduit_dealloc,
    .tp_methods = conduit_methods,
    .tp_members = conduit_members,
    .tp_getset = conduit_properties,
};

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
