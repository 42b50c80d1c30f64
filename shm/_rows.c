/* What a look at rows that have changed copies, many times cheaper than in numpy: a dozen of its calls, each of which
   costs the same for one row as for hundreds.

   The contract is that of the Python twin (`shm.seqlock.Snapshot`), which tests/shm/test_seqlock.py holds it to: the
   same loads of a row in the same order, and none outside of the arrays. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

enum { ARRAYS = 4 }; /* that a snapshot holds */

/* Loads of shared cells are single, aligned and in program order: atomics forbid the compiler to split, merge or invent
   them, `FENCE` forbids it and the CPU to let later loads overtake earlier ones (nothing to do on x86-64). */
#define FENCE() __atomic_thread_fence(__ATOMIC_ACQUIRE)

typedef struct {
    PyObject_HEAD
    Py_buffer held[ARRAYS];
    const int64_t *sequence, *shared; /* which another process writes */
    int64_t *copied, *values;
    int64_t *row; /* a copy that may not be whole */
    Py_ssize_t columns, slots;
    PyObject *before_load; /* called before each load of a shared cell; NULL but in tests */
} Snapshot;

static int hold(Py_buffer *into, PyObject *from, int ndim, int flags) {
    if (PyObject_GetBuffer(from, into, PyBUF_C_CONTIGUOUS | PyBUF_ND | flags) < 0) return -1;
    if (into->ndim == ndim && into->itemsize == 8 && (uintptr_t)into->buf % 8 == 0) return 0;
    PyErr_Format(PyExc_ValueError, "not an array of aligned int64 cells with %d axes", ndim);
    return -1; /* released with the object */
}

static PyObject *make(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(named)) {
    PyObject *from[ARRAYS];
    if (!PyArg_ParseTuple(arguments, "OOOO:Snapshot", &from[0], &from[1], &from[2], &from[3])) return NULL;
    Snapshot *s = (Snapshot *)type->tp_alloc(type, 0);
    if (s == NULL) return NULL;
    for (int i = 0; i < ARRAYS; i++)
        if (hold(&s->held[i], from[i], 1 + i % 2, i < 2 ? 0 : PyBUF_WRITABLE) < 0) goto refuse;
    s->sequence = s->held[0].buf, s->shared = s->held[1].buf;
    s->copied = s->held[2].buf, s->values = s->held[3].buf;
    s->columns = s->held[1].shape[0], s->slots = s->held[0].shape[0];
    for (int i = 0; i < ARRAYS; i++) {
        const Py_ssize_t *shape = s->held[i].shape;
        if (shape[i % 2] == s->slots && (i % 2 == 0 || shape[0] == s->columns)) continue;
        PyErr_SetString(PyExc_ValueError, "arrays of different tables");
        goto refuse;
    }
    s->row = PyMem_Malloc((size_t)s->columns * 8);
    if (s->row != NULL) return (PyObject *)s;
    PyErr_NoMemory();
refuse:
    Py_DECREF(s);
    return NULL;
}

static int interrupt(PyObject *call) {
    if (call == NULL) return 0;
    PyObject *done = PyObject_CallNoArgs(call);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

#define LOAD(into, cell, order)                        \
    do {                                               \
        if (interrupt(s->before_load) < 0) return -1;  \
        (into) = __atomic_load_n(&(cell), (order));    \
    } while (0)

/* 1 once the row is copied, 0 if it is being written, or was meanwhile; -1 with an exception. */
static int copy(Snapshot *s, Py_ssize_t slot, int64_t before) {
    const Py_ssize_t columns = s->columns, slots = s->slots;
    const int64_t *shared = s->shared + slot;
    int64_t *own = s->values + slot, *row = s->row, after;
    if (before & 1) return 0;
    for (Py_ssize_t column = 0; column < columns; column++)
        LOAD(row[column], shared[column * slots], __ATOMIC_RELAXED);
    FENCE();
    LOAD(after, s->sequence[slot], __ATOMIC_RELAXED);
    if (after != before) return 0;
    for (Py_ssize_t column = 0; column < columns; column++) own[column * slots] = row[column];
    s->copied[slot] = before;
    return 1;
}

static PyObject *renew(Snapshot *s, PyObject *given) {
    Py_ssize_t rows[2] = {0, 0}; /* missed, copied */
    Py_ssize_t used = PyLong_AsSsize_t(given);
    if (used == -1 && PyErr_Occurred()) return NULL;
    if (used > s->slots) used = s->slots;
    for (Py_ssize_t slot = 0; slot < used; slot++) {
        if (interrupt(s->before_load) < 0) return NULL;
        int64_t before = __atomic_load_n(&s->sequence[slot], __ATOMIC_ACQUIRE);
        if (before == s->copied[slot]) continue;
        int done = copy(s, slot, before);
        if (done < 0) return NULL;
        rows[done]++;
    }
    return Py_BuildValue("nn", rows[1], rows[0]);
}

static PyObject *set_before_load(Snapshot *s, PyObject *call) {
    Py_XSETREF(s->before_load, Py_IsNone(call) ? NULL : Py_NewRef(call));
    Py_RETURN_NONE;
}

static void let_go(Snapshot *s) {
    PyTypeObject *type = Py_TYPE(s);
    for (int i = 0; i < ARRAYS; i++) PyBuffer_Release(&s->held[i]);
    PyMem_Free(s->row);
    Py_XDECREF(s->before_load);
    type->tp_free(s);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"renew", (PyCFunction)renew, METH_O, "See _rows.pyi."},
    {"before_load", (PyCFunction)set_before_load, METH_O, "See _rows.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, make},
    {Py_tp_dealloc, let_go},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {"shm._rows.Snapshot", sizeof(Snapshot), 0, Py_TPFLAGS_DEFAULT, slots};

static int fill(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL) return -1;
    int done = PyModule_AddObjectRef(module, "Snapshot", type);
    Py_DECREF(type);
    return done;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "shm._rows", NULL, 0, NULL, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) {
    return PyModuleDef_Init(&module);
}
