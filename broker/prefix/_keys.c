/* The hash of `broker.prefix.keys`, several times cheaper; the same keys to the last bit, as tests/broker/test_prefix.py
   makes sure. It reads the characters where they lie, in whatever width, so nothing is encoded or copied. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Four or eight multiplications at once where the CPU has them: 1.7 us instead of 3 for 512 blocks of 64 characters. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDEST
#endif

typedef struct {
    const uint64_t *weights, *high; /* of whole words, and of their high halves once more */
} Weights;

/* A block of characters below 128, as bytes, eight to a word; `beyond` gets a bit of every character that is not. */
#define NARROW(name, type)                                                               \
    static inline uint64_t name(const type *from, Py_ssize_t block, Weights w, uint64_t *beyond) { \
        uint64_t sum = 0;                                                                \
        type all = 0;                                                                    \
        for (Py_ssize_t i = 0, k = 0; i < block; i += 8, k++) {                          \
            uint64_t word = 0;                                                           \
            for (int j = 0; j < 8 && i + j < block; j++) {                               \
                all |= from[i + j];                                                      \
                word |= (uint64_t)(from[i + j] & 127) << 8 * j;                          \
            }                                                                            \
            sum += word * w.weights[k] + (word >> 32) * w.high[k];                       \
        }                                                                                \
        *beyond = all & ~(type)127;                                                      \
        return sum;                                                                      \
    }

/* A block of any characters or ids, as 32-bit numbers, two to a word. */
#define WIDE(name, type)                                                                 \
    static inline uint64_t name(const type *from, Py_ssize_t block, Weights w) {         \
        uint64_t sum = 0;                                                                \
        for (Py_ssize_t i = 0, k = 0; i < block; i += 2, k++) {                          \
            uint64_t high = i + 1 < block ? (uint32_t)from[i + 1] : 0;                   \
            uint64_t word = (uint32_t)from[i] | high << 32;                              \
            sum += word * w.weights[k] + high * w.high[k];                               \
        }                                                                                \
        return sum;                                                                      \
    }

NARROW(narrow2, Py_UCS2)
NARROW(narrow4, Py_UCS4)
WIDE(wide1, Py_UCS1)
WIDE(wide2, Py_UCS2)
WIDE(wide4, Py_UCS4)
WIDE(wide8, int64_t)

static inline uint64_t narrow1(const Py_UCS1 *from, Py_ssize_t block, Weights w, uint64_t *beyond) {
    uint64_t sum = 0, all = 0, word;
    Py_ssize_t k = 0;
    for (; (k + 1) * 8 <= block; k++) {
        memcpy(&word, from + k * 8, 8);
        all |= word;
        sum += word * w.weights[k] + (word >> 32) * w.high[k];
    }
    if (k * 8 < block) {
        word = 0;
        memcpy(&word, from + k * 8, (size_t)(block - k * 8));
        all |= word;
        sum += word * w.weights[k] + (word >> 32) * w.high[k];
    }
    *beyond = all & 0x8080808080808080u;
    return sum;
}

/* Key k: the sum of the first k blocks' hashes, each weighted by its place. */
#define CHAIN(hash)                                  \
    for (Py_ssize_t k = 0; k < count; k++) {         \
        uint64_t beyond = 0, own = (hash);           \
        (void)beyond;                                \
        sum += own * places[k];                      \
        keys[k] = (sum ^ sum >> 32) | (uint64_t)1 << 63; \
    }

/* Raises ValueError when `from` is too short to have what is read of it. */
static const uint64_t *constants(PyObject *from, Py_ssize_t words) {
    if (PyBytes_Check(from) && PyBytes_GET_SIZE(from) >= words * 8) return (const uint64_t *)PyBytes_AS_STRING(from);
    PyErr_SetString(PyExc_ValueError, "too few constants");
    return NULL;
}

typedef struct {
    Py_buffer out;
    uint64_t *keys, start;
    const uint64_t *places;
    Py_ssize_t block, count;
} Task;

/* The common part of both calls' arguments: block, start, places, keys. */
static int begin(Task *task, PyObject *const *given) {
    task->block = PyLong_AsSsize_t(given[0]);
    if (task->block == -1 && PyErr_Occurred()) return -1;
    task->start = PyLong_AsUnsignedLongLongMask(given[1]);
    if (task->start == (uint64_t)-1 && PyErr_Occurred()) return -1;
    if (PyObject_GetBuffer(given[3], &task->out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) return -1;
    task->keys = task->out.buf;
    task->count = task->out.len / 8;
    task->places = constants(given[2], task->count);
    if (task->places != NULL && task->block > 0 && (uintptr_t)task->keys % 8 == 0) return 0;
    if (task->places != NULL) PyErr_SetString(PyExc_ValueError, "no block, or keys that are not aligned");
    PyBuffer_Release(&task->out);
    return -1;
}

/* Key k of each block of a text; `characters` is the width of one in bytes. */
#define TEXT(characters, type)                                                     \
    {                                                                              \
        const type *from = data;                                                   \
        CHAIN((own = narrow##characters(from + k * block, block, narrow, &beyond), \
               beyond ? wide##characters(from + k * block, block, wide) : own))    \
        break;                                                                     \
    }

WIDEST static void chain_text(const Task *task, int kind, const void *data, Weights narrow, Weights wide) {
    const Py_ssize_t block = task->block, count = task->count;
    const uint64_t *places = task->places;
    uint64_t *keys = task->keys, sum = task->start;
    switch (kind) {
    case PyUnicode_1BYTE_KIND: TEXT(1, Py_UCS1)
    case PyUnicode_2BYTE_KIND: TEXT(2, Py_UCS2)
    default: TEXT(4, Py_UCS4)
    }
}

static PyObject *text_keys(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t arguments) {
    Task task;
    if (arguments != 9 || !PyUnicode_Check(given[4]) || PyUnicode_READY(given[4]) < 0)
        return PyErr_Format(PyExc_TypeError, "text_keys(block, start, places, keys, text, narrow, high, wide, high)");
    if (begin(&task, given) < 0) return NULL;
    const Py_ssize_t block = task.block;
    Weights narrow = {constants(given[5], (block + 7) / 8), constants(given[6], (block + 7) / 8)};
    Weights wide = {constants(given[7], (block + 1) / 2), constants(given[8], (block + 1) / 2)};
    if (!PyErr_Occurred()) {
        if (PyUnicode_GET_LENGTH(given[4]) / block < task.count)
            PyErr_SetString(PyExc_ValueError, "the text has fewer blocks");
        else
            chain_text(&task, PyUnicode_KIND(given[4]), PyUnicode_DATA(given[4]), narrow, wide);
    }
    PyBuffer_Release(&task.out);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyObject *token_keys(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t arguments) {
    Task task;
    Py_buffer ids;
    if (arguments != 7) return PyErr_Format(PyExc_TypeError, "token_keys(block, start, places, keys, ids, wide, high)");
    if (begin(&task, given) < 0) return NULL;
    if (PyObject_GetBuffer(given[4], &ids, PyBUF_C_CONTIGUOUS) < 0) goto release;
    const Py_ssize_t block = task.block, count = task.count;
    Weights wide = {constants(given[5], (block + 1) / 2), constants(given[6], (block + 1) / 2)};
    if (!PyErr_Occurred()) {
        if (ids.len / 8 / block < count || (uintptr_t)ids.buf % 8) {
            PyErr_SetString(PyExc_ValueError, "fewer blocks of ids, or none of 64 bits");
        } else {
            const uint64_t *places = task.places;
            const int64_t *from = ids.buf;
            uint64_t *keys = task.keys, sum = task.start;
            CHAIN(wide8(from + k * block, block, wide))
        }
    }
    PyBuffer_Release(&ids);
release:
    PyBuffer_Release(&task.out);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyObject *alike(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t arguments) {
    Py_buffer one, other;
    if (arguments != 2) return PyErr_Format(PyExc_TypeError, "alike(keys, others)");
    if (PyObject_GetBuffer(given[0], &one, PyBUF_C_CONTIGUOUS) < 0) return NULL;
    if (PyObject_GetBuffer(given[1], &other, PyBUF_C_CONTIGUOUS) < 0) {
        PyBuffer_Release(&one);
        return NULL;
    }
    const char *keys = one.buf, *others = other.buf;
    Py_ssize_t size = one.len < other.len ? one.len : other.len, at = 0;
    for (const Py_ssize_t stride = 128; at + stride <= size && memcmp(keys + at, others + at, stride) == 0;) at += stride;
    while (at + 8 <= size && memcmp(keys + at, others + at, 8) == 0) at += 8;
    PyBuffer_Release(&other);
    PyBuffer_Release(&one);
    return PyLong_FromSsize_t(at / 8);
}

static PyMethodDef methods[] = {
    {"text_keys", (PyCFunction)(void (*)(void))text_keys, METH_FASTCALL, "See _keys.pyi."},
    {"alike", (PyCFunction)(void (*)(void))alike, METH_FASTCALL, "See _keys.pyi."},
    {"token_keys", (PyCFunction)(void (*)(void))token_keys, METH_FASTCALL, "See _keys.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "broker.prefix._keys", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__keys(void) {
    return PyModuleDef_Init(&module);
}
