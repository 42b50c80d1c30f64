/* The long strings of a JSON text, read at the speed of memory; what is left of it is for a real parser. Of a body of
   32 KiB the parser's way through one long string was the dearest single thing (docs/performance.md, section 6).

   Nothing is parsed here. In valid JSON a quote that is not within a string begins one, so strings can be found without
   knowing what is between them; whether it is valid JSON is the parser's word on the rest. What is not beyond doubt, or
   not worth the trouble, is not touched. tests/frontend/test_lifting.py holds it to what the parser makes of the whole. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { STRIDE = 256 };
enum { RUN = 128, SHORT = 32 }; /* where runs are shorter in the mean, the parser is as fast; but for so many */
enum { MARK = 32 }; /* more than the longest mark has bytes; no shorter string is lifted */

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDEST
#endif

/* The first byte from `at` on that ends a run of a string: a quote, a backslash, or what must not be in one. The highest
   bit of `beyond` is set if a byte before it is not ASCII. First in great strides, then where in the last one. */
WIDEST static const uint8_t *run(const uint8_t *at, const uint8_t *end, uint8_t *beyond) {
    for (; end - at >= STRIDE; at += STRIDE) {
        uint8_t ends = 0, all = 0;
        for (int i = 0; i < STRIDE; i++) {
            ends |= (at[i] == '"') | (at[i] == '\\') | (at[i] < ' ');
            all |= at[i];
        }
        if (ends) break;
        *beyond |= all;
    }
#ifdef __SSE2__
    const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), control = _mm_set1_epi8(' ' - 1);
    for (; end - at >= 16; at += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        __m128i ends = _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, slash));
        if (_mm_movemask_epi8(_mm_or_si128(ends, _mm_cmpeq_epi8(_mm_min_epu8(bytes, control), bytes)))) break;
        if (_mm_movemask_epi8(bytes)) *beyond |= 128;
    }
#endif
    for (; at < end && *at != '"' && *at != '\\' && *at >= ' '; at++) *beyond |= *at;
    return at;
}

/* Of the letter behind a backslash what it stands for; 0: it is none, or a number follows. */
static uint8_t meant(uint8_t letter) {
    switch (letter) {
    case '"': case '\\': case '/': return letter;
    case 'b': return '\b';
    case 'f': return '\f';
    case 'n': return '\n';
    case 'r': return '\r';
    case 't': return '\t';
    default: return 0;
    }
}

/* What stands between two quotes; `room` has space for as many bytes. NULL with an exception. */
static PyObject *text(const uint8_t *from, const uint8_t *end, Py_ssize_t escapes, int is_ascii, uint8_t *room) {
    Py_ssize_t size = end - from;
    if (escapes) {
        uint8_t *to = room;
        for (const uint8_t *next; (next = memchr(from, '\\', (size_t)(end - from))) != NULL; from = next + 2) {
            memcpy(to, from, (size_t)(next - from));
            to += next - from;
            *to++ = meant(next[1]);
        }
        memcpy(to, from, (size_t)(end - from));
        from = room;
        size -= escapes;
    }
    if (!is_ascii) return PyUnicode_DecodeUTF8((const char *)from, size, "strict");
    PyObject *made = PyUnicode_New(size, 127);
    if (made != NULL) memcpy(PyUnicode_1BYTE_DATA(made), from, (size_t)size);
    return made;
}

/* 1: `texts` got what was lifted, and `out`, of the size of the whole, what is left. 0: let the parser have it all; an
   exception may be set, which says why. */
static int lift_all(const uint8_t *at, const uint8_t *end, Py_ssize_t least, uint8_t *out, Py_ssize_t *used,
                    PyObject *texts) {
    const uint8_t *data = at, *left = at; /* not copied yet from `left` on */
    Py_ssize_t runs = -SHORT;
    while ((at = memchr(at, '"', (size_t)(end - at))) != NULL) {
        const uint8_t *begin = ++at;
        Py_ssize_t escapes = 0;
        uint8_t beyond = 0;
        int is_plain = 1;
        while ((at = run(at, end, &beyond)) < end && *at == '\\') {
            if (end - at < 2 || ++runs * RUN > at - data) return 0;
            if (end - at >= 6 && memcmp(at + 1, "u0000", 5) == 0) return 0; /* a mark must not be found anywhere else */
            is_plain = is_plain && meant(at[1]);
            escapes++;
            at += 2;
        }
        if (at == end || *at != '"' || ++runs * RUN > at - data) return 0;
        if (at - begin >= least && is_plain) {
            memcpy(out + *used, left, (size_t)(begin - left));
            *used += begin - left;
            PyObject *made = text(begin, at, escapes, beyond < 128, out + *used);
            int done = made == NULL ? -1 : PyList_Append(texts, made);
            Py_XDECREF(made);
            if (done < 0) return 0;
            *used += PyOS_snprintf((char *)out + *used, MARK, "\\u0000%zd", PyList_GET_SIZE(texts) - 1);
            left = at;
        }
        at++;
    }
    memcpy(out + *used, left, (size_t)(end - left));
    *used += end - left;
    return PyList_GET_SIZE(texts) > 0;
}

static PyObject *lift(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t arguments) {
    if (arguments != 2 || !PyBytes_Check(given[0])) return PyErr_Format(PyExc_TypeError, "lift(data, least)");
    Py_ssize_t size = PyBytes_GET_SIZE(given[0]), least = PyLong_AsSsize_t(given[1]), used = 0;
    if (least == -1 && PyErr_Occurred()) return NULL;
    const uint8_t *data = (const uint8_t *)PyBytes_AS_STRING(given[0]);
    uint8_t *out = PyMem_Malloc((size_t)size + MARK);
    PyObject *texts = PyList_New(0), *found = NULL;
    if (out == NULL) PyErr_NoMemory();
    else if (texts != NULL && lift_all(data, data + size, least < MARK ? MARK : least, out, &used, texts))
        found = Py_BuildValue("y#O", (char *)out, used, texts);
    PyMem_Free(out);
    Py_XDECREF(texts);
    if (found != NULL) return found;
    if (PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) PyErr_Clear();
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"lift", (PyCFunction)(void (*)(void))lift, METH_FASTCALL, "See _lift.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "frontend._lift", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__lift(void) {
    return PyModuleDef_Init(&module);
}
