/* Single cells of shared memory, what two counters make of them, and a fence: each several times cheaper than through
   `memoryview`, numpy and a lock, and on the way of every request.

   The contract is that of the Python twins (`memoryview` for `Cells`, `shm.cells.Gauges`, `shm.fence`), which
   tests/shm/test_cells.py holds them to: every access is one aligned atomic of eight bytes, in program order, and inside
   the arrays. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { FEW = 64 }; /* gauges that are added up without asking for memory */

/* Nothing to do on x86-64 but to forbid the compiler to move a load across. */
#define FENCE() __atomic_thread_fence(__ATOMIC_ACQUIRE)

static int aligned(PyObject *from, Py_buffer *into, int flags) {
    if (PyObject_GetBuffer(from, into, flags) < 0) return -1;
    if (into->len % 8 == 0 && (uintptr_t)into->buf % 8 == 0) return 0;
    PyBuffer_Release(into);
    PyErr_SetString(PyExc_ValueError, "not a buffer of aligned int64 cells");
    return -1;
}

/* -- Cells ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Py_buffer held;
    int64_t *cells; /* NULL once released */
    Py_ssize_t count;
} Cells;

static PyObject *make_cells(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(named)) {
    PyObject *from;
    if (!PyArg_ParseTuple(arguments, "O:Cells", &from)) return NULL;
    Cells *c = (Cells *)type->tp_alloc(type, 0);
    if (c == NULL) return NULL;
    if (aligned(from, &c->held, PyBUF_C_CONTIGUOUS | PyBUF_ND) < 0) {
        Py_DECREF(c);
        return NULL;
    }
    c->cells = c->held.buf;
    c->count = c->held.len / 8;
    return (PyObject *)c;
}

static int64_t *cell(Cells *c, PyObject *index) {
    Py_ssize_t i = PyNumber_AsSsize_t(index, PyExc_IndexError);
    if (i == -1 && PyErr_Occurred()) return NULL;
    if (i < 0) i += c->count;
    if (i >= 0 && i < c->count) return &c->cells[i];
    if (c->cells == NULL) PyErr_SetString(PyExc_ValueError, "operation forbidden on released cells");
    else PyErr_SetString(PyExc_IndexError, "index out of bounds");
    return NULL;
}

static PyObject *get_cell(Cells *c, PyObject *index) {
    int64_t *at = cell(c, index);
    return at == NULL ? NULL : PyLong_FromLongLong(__atomic_load_n(at, __ATOMIC_ACQUIRE));
}

static int set_cell(Cells *c, PyObject *index, PyObject *given) {
    int64_t *at = cell(c, index);
    if (at == NULL) return -1;
    if (given == NULL || c->held.readonly) {
        PyErr_SetString(PyExc_TypeError, given == NULL ? "cannot delete memory" : "cannot modify read-only memory");
        return -1;
    }
    int64_t value = PyLong_AsLongLong(given);
    if (value == -1 && PyErr_Occurred()) return -1;
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
    return 0;
}

static Py_ssize_t count_cells(Cells *c) {
    return c->count;
}

static PyObject *release_cells(Cells *c, PyObject *Py_UNUSED(none)) {
    c->cells = NULL;
    c->count = 0;
    PyBuffer_Release(&c->held); /* which does nothing the second time */
    Py_RETURN_NONE;
}

static void let_cells_go(Cells *c) {
    PyTypeObject *type = Py_TYPE(c);
    PyBuffer_Release(&c->held);
    type->tp_free(c);
    Py_DECREF(type);
}

static PyMethodDef cells_methods[] = {
    {"release", (PyCFunction)release_cells, METH_NOARGS, "See _cells.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cells_slots[] = {
    {Py_tp_new, make_cells},
    {Py_tp_dealloc, let_cells_go},
    {Py_tp_methods, cells_methods},
    {Py_mp_subscript, get_cell},
    {Py_mp_ass_subscript, set_cell},
    {Py_mp_length, count_cells},
    {0, NULL},
};

static PyType_Spec cells_spec = {"shm._cells.Cells", sizeof(Cells), 0, Py_TPFLAGS_DEFAULT, cells_slots};

/* -- Gauges --------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    Py_buffer block, live; /* (rows, columns, width), and how many of the rows count */
    int64_t *rows;
    PyObject *before_load; /* called before each load of a counter; NULL but in tests */
} Gauges;

static PyObject *make_gauges(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(named)) {
    PyObject *block, *rows, *used;
    if (!PyArg_ParseTuple(arguments, "OOO:Gauges", &block, &rows, &used)) return NULL;
    Gauges *g = (Gauges *)type->tp_alloc(type, 0);
    if (g == NULL) return NULL;
    if (aligned(block, &g->block, PyBUF_STRIDES) < 0 || aligned(rows, &g->live, PyBUF_C_CONTIGUOUS | PyBUF_ND) < 0)
        goto refuse;
    g->rows = g->live.buf;
    if (g->block.ndim != 3 || g->block.itemsize != 8 || g->block.strides[2] != 8 || g->block.strides[0] % 8 ||
        g->block.strides[1] % 8 || g->live.len < 8) {
        PyErr_SetString(PyExc_ValueError, "not a block of counters by row and column, and a cell");
        goto refuse;
    }
    return (PyObject *)g;
refuse:
    Py_DECREF(g);
    return NULL;
}

static int interrupt(PyObject *call) {
    PyObject *done = PyObject_CallNoArgs(call);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Adds `sign` times the counters of a column, of all rows, to each gauge; -1 with an exception. */
static int add_column(Gauges *g, Py_ssize_t column, int sign, const int64_t *indices, Py_ssize_t count, int64_t *gauges) {
    Py_ssize_t rows = __atomic_load_n(g->rows, __ATOMIC_ACQUIRE);
    if (rows > g->block.shape[0]) rows = g->block.shape[0];
    int interrupts = g->before_load != NULL;
    const char *cells = (const char *)g->block.buf + column * g->block.strides[1];
    for (Py_ssize_t row = 0; row < rows; row++, cells += g->block.strides[0]) {
        const int64_t *counters = (const int64_t *)cells;
        for (Py_ssize_t i = 0; i < count; i++) {
            if (interrupts && interrupt(g->before_load) < 0) return -1;
            gauges[i] += sign * __atomic_load_n(&counters[indices[i]], __ATOMIC_RELAXED);
        }
    }
    return 0;
}

/* Finished first: see `shm.cells`. */
static int measure(Gauges *g, const Py_ssize_t *columns, const int64_t *indices, Py_ssize_t count, int64_t *gauges) {
    for (Py_ssize_t i = 0; i < count; i++) {
        if (indices[i] >= 0 && indices[i] < g->block.shape[2]) continue;
        PyErr_SetString(PyExc_IndexError, "no such counter");
        return -1;
    }
    memset(gauges, 0, (size_t)count * 8);
    if (add_column(g, columns[0], -1, indices, count, gauges) < 0) return -1;
    FENCE();
    return add_column(g, columns[1], 1, indices, count, gauges);
}

/* `finished` and `started`, the first two of the arguments. */
static int columns_of(Gauges *g, PyObject *const *arguments, Py_ssize_t given, Py_ssize_t wanted, Py_ssize_t *columns) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", wanted, given);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        columns[i] = PyLong_AsSsize_t(arguments[i]);
        if (columns[i] >= 0 && columns[i] < g->block.shape[1]) continue;
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_IndexError, "no such column");
        return -1;
    }
    return 0;
}

static PyObject *one(Gauges *g, PyObject *const *arguments, Py_ssize_t given) {
    Py_ssize_t columns[2];
    if (columns_of(g, arguments, given, 3, columns) < 0) return NULL;
    int64_t gauge, index = PyLong_AsLongLong(arguments[2]);
    if (index == -1 && PyErr_Occurred()) return NULL;
    return measure(g, columns, &index, 1, &gauge) < 0 ? NULL : PyLong_FromLongLong(gauge);
}

static PyObject *few(Gauges *g, PyObject *const *arguments, Py_ssize_t given) {
    Py_ssize_t columns[2];
    int64_t room[2 * FEW], *indices = room;
    if (columns_of(g, arguments, given, 3, columns) < 0) return NULL;
    if (!PyTuple_Check(arguments[2])) return PyErr_Format(PyExc_TypeError, "indices in a tuple");
    Py_ssize_t count = PyTuple_GET_SIZE(arguments[2]);
    if (count > FEW && (indices = PyMem_Malloc(2 * (size_t)count * 8)) == NULL) return PyErr_NoMemory();
    PyObject *found = NULL;
    for (Py_ssize_t i = 0; i < count; i++) indices[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(arguments[2], i));
    if (!PyErr_Occurred() && measure(g, columns, indices, count, indices + count) == 0) found = PyTuple_New(count);
    for (Py_ssize_t i = 0; found != NULL && i < count; i++) {
        PyObject *gauge = PyLong_FromLongLong(indices[count + i]);
        if (gauge == NULL) Py_CLEAR(found);
        else PyTuple_SET_ITEM(found, i, gauge);
    }
    if (indices != room) PyMem_Free(indices);
    return found;
}

static PyObject *many(Gauges *g, PyObject *const *arguments, Py_ssize_t given) {
    Py_ssize_t columns[2];
    Py_buffer indices, out;
    int done = -1;
    if (columns_of(g, arguments, given, 4, columns) < 0) return NULL;
    if (aligned(arguments[2], &indices, PyBUF_C_CONTIGUOUS) < 0) return NULL;
    if (aligned(arguments[3], &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) goto release_indices;
    if (indices.len != out.len) PyErr_SetString(PyExc_ValueError, "indices and gauges of different lengths");
    else done = measure(g, columns, indices.buf, indices.len / 8, out.buf);
    PyBuffer_Release(&out);
release_indices:
    PyBuffer_Release(&indices);
    if (done < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *set_before_load(Gauges *g, PyObject *call) {
    Py_XSETREF(g->before_load, Py_IsNone(call) ? NULL : Py_NewRef(call));
    Py_RETURN_NONE;
}

static void let_gauges_go(Gauges *g) {
    PyTypeObject *type = Py_TYPE(g);
    PyBuffer_Release(&g->block);
    PyBuffer_Release(&g->live);
    Py_XDECREF(g->before_load);
    type->tp_free(g);
    Py_DECREF(type);
}

static PyMethodDef gauges_methods[] = {
    {"one", (PyCFunction)(void (*)(void))one, METH_FASTCALL, "See _cells.pyi."},
    {"few", (PyCFunction)(void (*)(void))few, METH_FASTCALL, "See _cells.pyi."},
    {"many", (PyCFunction)(void (*)(void))many, METH_FASTCALL, "See _cells.pyi."},
    {"before_load", (PyCFunction)set_before_load, METH_O, "See _cells.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot gauges_slots[] = {
    {Py_tp_new, make_gauges},
    {Py_tp_dealloc, let_gauges_go},
    {Py_tp_methods, gauges_methods},
    {0, NULL},
};

static PyType_Spec gauges_spec = {"shm._cells.Gauges", sizeof(Gauges), 0, Py_TPFLAGS_DEFAULT, gauges_slots};

/* -- the module ----------------------------------------------------------------------------------------------------- */

typedef struct {
    PyTypeObject *cells; /* borrowed from the module's dict */
} State;

static PyObject *full_fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none)) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    Py_RETURN_NONE;
}

/* Of cells of our own at once; others, as tests have them, one access after the other. */
static PyObject *add(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    if (given % 2 == 0) return PyErr_Format(PyExc_TypeError, "add(cells, index, amount, ...)");
    PyObject *cells = arguments[0];
    int ours = Py_IS_TYPE(cells, ((State *)PyModule_GetState(module))->cells) && !((Cells *)cells)->held.readonly;
    for (Py_ssize_t i = 1; i < given; i += 2) {
        PyObject *index = arguments[i], *amount = arguments[i + 1];
        if (ours) {
            int64_t *at = cell((Cells *)cells, index);
            if (at == NULL) return NULL;
            int64_t more = PyLong_AsLongLong(amount);
            if (more == -1 && PyErr_Occurred()) return NULL;
            __atomic_store_n(at, (int64_t)((uint64_t)__atomic_load_n(at, __ATOMIC_RELAXED) + (uint64_t)more), __ATOMIC_RELEASE);
            continue;
        }
        PyObject *before = PyObject_GetItem(cells, index);
        PyObject *after = before == NULL ? NULL : PyNumber_Add(before, amount);
        int done = after == NULL ? -1 : PyObject_SetItem(cells, index, after);
        Py_XDECREF(before);
        Py_XDECREF(after);
        if (done < 0) return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, "See _cells.pyi."},
    {"full", full_fence, METH_NOARGS, "See _cells.pyi."},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
    static PyType_Spec *const specs[] = {&cells_spec, &gauges_spec};
    static const char *const names[] = {"Cells", "Gauges"};
    for (int i = 0; i < 2; i++) {
        PyObject *type = PyType_FromSpec(specs[i]);
        if (type == NULL) return -1;
        if (i == 0) ((State *)PyModule_GetState(module))->cells = (PyTypeObject *)type;
        int done = PyModule_AddObjectRef(module, names[i], type);
        Py_DECREF(type);
        if (done < 0) return -1;
    }
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "shm._cells", NULL, sizeof(State), functions, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cells(void) {
    return PyModuleDef_Init(&module);
}
