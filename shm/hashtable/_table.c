/* The look-up of `shm.hashtable.reader` and the usual case of `TableWriter.add`, several times cheaper: what a decision
   about a long prompt costs otherwise, and what the scheduler has to do for it.

   The contract is that of the Python twins, which tests/shm/test_hashtable.py holds them to: the same loads and stores
   in the same order (see `shm.hashtable`), the same result for every state of the table, and no access outside its
   arrays, whatever these hold. The interpreter's lock is held throughout: 512 keys take a few microseconds, most of them
   spent waiting for cache lines, so the lines of the next keys are asked for before those of the present ones are
   looked at. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { WAYS = 8, WAY_BITS = 3, FIELDS = 4, FIELD_BITS = 16, PLACE_BITS = 16 };
enum { COUNT_BITS = 24, COUNT_MASK = (1 << COUNT_BITS) - 1, COUNT_UNIT = 256, HORIZON = 1024, INSERTED = 2 };
enum { ROUND = 64 };       /* keys that are looked at together */
enum { MOST_ASKED = 64 };  /* members that `reach` is asked for, */
enum { STEP = 8 };         /* at so many keys first, then at four times as many, and so on */
enum { MOST_WORDS = 512 }; /* of a bitmap: MAX_MEMBERS + 1 bits */
enum { ARRAYS = 6 };       /* that make up a table */

#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define PREFETCH(p) __builtin_prefetch(p)

typedef struct {
    PyObject_HEAD
    Py_buffer held[ARRAYS];
    int64_t *cells, *sequence, *keys, *members, *uses, *pool; /* stored to by `add` alone, if all are writable */
    Py_ssize_t mask;  /* buckets - 1 */
    Py_ssize_t sets;  /* bitmaps in the pool */
    Py_ssize_t words; /* of a bitmap */
    PyObject *before_load, *before_store; /* called before each of a shared cell; NULL but in tests */
} Table;

/* Loads of shared cells are single, aligned and in program order: atomics forbid the compiler to split, merge or invent
   them, `FENCE` forbids it and the CPU to let later loads overtake earlier ones (nothing to do on x86-64). */
#define FENCE() __atomic_thread_fence(__ATOMIC_ACQUIRE)

static int interrupt(PyObject *call) {
    PyObject *done = PyObject_CallNoArgs(call);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

#define LOAD(into, cell)                                                   \
    do {                                                                   \
        if (UNLIKELY(t->before_load != NULL) && interrupt(t->before_load) < 0) return -1; \
        (into) = __atomic_load_n(&(cell), __ATOMIC_RELAXED);               \
    } while (0)

/* Stores become visible in program order. */
#define STORE(cell, value)                                                 \
    do {                                                                   \
        if (UNLIKELY(t->before_store != NULL) && interrupt(t->before_store) < 0) return -1; \
        __atomic_store_n(&(cell), (value), __ATOMIC_RELEASE);              \
    } while (0)

/* Where members were seen: index behind the last key whose set has the member. Keys come from the last to the first, so
   the first one seen counts. Either every member's, or of those `asked` alone; what is not asked for counts as seen. */
typedef struct {
    int64_t *reach;       /* by member, or one for each of those asked */
    Py_ssize_t members;   /* so many, or */
    const int64_t *asked; /* these; NULL: every one */
    Py_ssize_t left;      /* of these, not seen yet */
    uint64_t seen[MOST_WORDS];
} Reach;

static void enter(Reach *r, Py_ssize_t word, uint64_t bits, int64_t stop) {
    bits &= ~r->seen[word];
    r->seen[word] |= bits;
    for (; bits; bits &= bits - 1) {
        Py_ssize_t member = word * 64 + __builtin_ctzll(bits), i = 0;
        if (r->asked == NULL) {
            if (member < r->members) r->reach[member] = stop;
            continue;
        }
        while (r->asked[i] != member) i++;
        r->reach[i] = stop;
        r->left--;
    }
}

/* Looks at the keys from `first` on. Fills the ends of `at`, `places` and `moments`, unless `at` is NULL; returns how many
   were found, or -1 with an exception. Where members are asked for, it ends with the last of them. */
static Py_ssize_t look_up(Table *t, const int64_t *keys, Py_ssize_t first, Py_ssize_t count, int64_t *at,
                          int64_t *places, int64_t *moments, Reach *r) {
    Py_ssize_t found = 0;
    int64_t entered = 0; /* the word that `r` knows already; 0 is the empty set */
    int64_t before[ROUND], place[ROUND];
    for (Py_ssize_t i = count - 1; i >= first && i >= count - ROUND; i--) {
        Py_ssize_t bucket = keys[i] & t->mask;
        PREFETCH(&t->sequence[bucket]);
        PREFETCH(&t->keys[bucket * WAYS]);
    }
    for (Py_ssize_t stop = count; stop > first; stop -= ROUND) {
        Py_ssize_t start = stop - first > ROUND ? stop - ROUND : first;
        for (Py_ssize_t i = stop - 1; i >= start; i--) {
            Py_ssize_t bucket = keys[i] & t->mask, next = i - ROUND;
            if (next >= first) {
                Py_ssize_t then = keys[next] & t->mask;
                PREFETCH(&t->sequence[then]);
                PREFETCH(&t->keys[then * WAYS]);
            }
            LOAD(before[i - start], t->sequence[bucket]);
            FENCE();
            place[i - start] = -1;
            if (before[i - start] & 1) continue;
            for (Py_ssize_t way = 0; way < WAYS; way++) {
                int64_t key;
                LOAD(key, t->keys[bucket * WAYS + way]);
                if (key == keys[i]) {
                    place[i - start] = bucket * WAYS + way;
                    PREFETCH(&t->members[bucket * WAYS + way]);
                    break;
                }
            }
        }
        FENCE();
        for (Py_ssize_t i = stop - 1; i >= start; i--) {
            int64_t where = place[i - start], word, again;
            uint64_t bits[MOST_WORDS];
            if (where < 0) continue;
            LOAD(word, t->members[where]);
            if (word < 0 && word != entered) {
                Py_ssize_t set = ~word & ((1 << PLACE_BITS) - 1);
                if (set >= t->sets) continue;
                FENCE();
                for (Py_ssize_t w = 0; w < t->words; w++) LOAD(bits[w], t->pool[set * t->words + w]);
                FENCE();
                LOAD(again, t->members[where]);
                if (again != word) continue; /* the bitmap may have been another set's */
            }
            FENCE();
            LOAD(again, t->sequence[where >> WAY_BITS]);
            if (again != before[i - start]) continue; /* the place may have been another key's */
            found++;
            if (at != NULL) {
                at[count - found] = i;
                places[count - found] = where;
                moments[count - found] = again;
            }
            if (word == entered) continue;
            entered = word;
            for (Py_ssize_t w = 0; word < 0 && w < t->words; w++) enter(r, w, bits[w], i + 1);
            for (int field = 0; word >= 0 && field < FIELDS; field++) {
                int64_t member = (word >> field * FIELD_BITS & ((1 << FIELD_BITS) - 1)) - 1;
                if (member >= 0 && member < t->words * 64)
                    enter(r, member >> 6, (uint64_t)1 << (member & 63), i + 1);
            }
            if (r->asked != NULL && !r->left) return found;
        }
    }
    return found;
}

static int cells(PyObject *from, Py_buffer *into, int flags) {
    if (PyObject_GetBuffer(from, into, PyBUF_C_CONTIGUOUS | flags) < 0) return -1;
    if (into->len % 8 == 0 && (uintptr_t)into->buf % 8 == 0) return 0;
    PyBuffer_Release(into);
    PyErr_SetString(PyExc_ValueError, "not a buffer of aligned int64 cells");
    return -1;
}

static PyObject *find(Table *t, PyObject *const *arguments, Py_ssize_t given) {
    Py_buffer keys, out, reach;
    Py_ssize_t found = -1;
    if (given != 3) return PyErr_Format(PyExc_TypeError, "find(keys, out, reach)");
    if (cells(arguments[0], &keys, 0) < 0) return NULL;
    if (cells(arguments[1], &out, PyBUF_WRITABLE) < 0) goto release_keys;
    if (cells(arguments[2], &reach, PyBUF_WRITABLE) < 0) goto release_out;
    Py_ssize_t count = keys.len / 8;
    if (out.len < 3 * keys.len) {
        PyErr_SetString(PyExc_ValueError, "no room for what is found");
    } else {
        Reach r = {reach.buf, reach.len / 8, NULL, 0, {0}};
        int64_t *at = out.buf;
        found = look_up(t, keys.buf, 0, count, at, at + count, at + 2 * count, &r);
    }
    PyBuffer_Release(&reach);
release_out:
    PyBuffer_Release(&out);
release_keys:
    PyBuffer_Release(&keys);
    return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

static PyObject *reach(Table *t, PyObject *const *arguments, Py_ssize_t given) {
    int64_t asked[MOST_ASKED], reached[MOST_ASKED] = {0};
    Reach r = {reached, 0, asked, 0, {0}};
    Py_buffer keys;
    if (given != 2 || !PyTuple_Check(arguments[1])) return PyErr_Format(PyExc_TypeError, "reach(keys, members)");
    Py_ssize_t count = PyTuple_GET_SIZE(arguments[1]);
    if (count > MOST_ASKED) return PyErr_Format(PyExc_ValueError, "at most %d members", MOST_ASKED);
    memset(r.seen, 0xff, (size_t)t->words * 8);
    for (; r.left < count; r.left++) {
        int64_t member = asked[r.left] = PyLong_AsLongLong(PyTuple_GET_ITEM(arguments[1], r.left));
        if (member == -1 && PyErr_Occurred()) return NULL;
        uint64_t bit = (uint64_t)1 << (member & 63);
        if (member < 0 || member >= t->words * 64 || !(r.seen[member >> 6] & bit))
            return PyErr_Format(PyExc_ValueError, "no such member, or asked for twice");
        r.seen[member >> 6] &= ~bit;
    }
    if (cells(arguments[0], &keys, 0) < 0) return NULL;
    Py_ssize_t found = 0, step = STEP;
    for (Py_ssize_t stop = keys.len / 8; stop > 0 && r.left && found >= 0; stop -= step, step *= 4)
        found = look_up(t, keys.buf, stop > step ? stop - step : 0, stop, NULL, NULL, NULL, &r);
    PyBuffer_Release(&keys);
    PyObject *list = found < 0 ? NULL : PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *stop = PyLong_FromLongLong(reached[i]);
        if (stop == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, stop);
    }
    return list;
}

/* Fills `out`; 0, or -1 with an exception. */
static int fade_all(Table *t, const int64_t *places, const int64_t *moments, Py_ssize_t count, const int64_t *which,
                    Py_ssize_t asked, int64_t tick, double *out) {
    int64_t last_age = -1;
    double faded = 0;
    for (Py_ssize_t i = 0; i < asked; i++)
        if (which[i] >= 0 && which[i] < count && places[which[i]] >= 0 && places[which[i]] < (t->mask + 1) * WAYS)
            PREFETCH(&t->uses[places[which[i]]]);
    for (Py_ssize_t i = 0; i < asked; i++) {
        out[i] = 0;
        if (which[i] < 0 || which[i] >= count) continue;
        int64_t where = places[which[i]], use, moment;
        if (where < 0 || where >= (t->mask + 1) * WAYS) continue;
        LOAD(use, t->uses[where]);
        FENCE();
        LOAD(moment, t->sequence[where >> WAY_BITS]);
        if (moment != moments[which[i]]) continue; /* it may be another key's by now */
        int64_t age = tick - (use >> COUNT_BITS);
        if (age != last_age) faded = age > 0 ? exp((double)age * (-1.0 / HORIZON)) : 1;
        last_age = age;
        out[i] = faded * (double)(use & COUNT_MASK) / COUNT_UNIT;
    }
    return 0;
}

static PyObject *uses(Table *t, PyObject *const *arguments, Py_ssize_t given) {
    Py_buffer places, moments, which, out;
    int done = -1;
    if (given != 5) return PyErr_Format(PyExc_TypeError, "uses(places, moments, which, tick, out)");
    int64_t tick = PyLong_AsLongLong(arguments[3]);
    if (tick == -1 && PyErr_Occurred()) return NULL;
    if (cells(arguments[0], &places, 0) < 0) return NULL;
    if (cells(arguments[1], &moments, 0) < 0) goto release_places;
    if (cells(arguments[2], &which, 0) < 0) goto release_moments;
    if (cells(arguments[4], &out, PyBUF_WRITABLE) < 0) goto release_which;
    if (places.len != moments.len || which.len != out.len)
        PyErr_SetString(PyExc_ValueError, "places and moments, or questions and answers, of different lengths");
    else
        done = fade_all(t, places.buf, moments.buf, places.len / 8, which.buf, which.len / 8, tick, out.buf);
    PyBuffer_Release(&out);
release_which:
    PyBuffer_Release(&which);
release_moments:
    PyBuffer_Release(&moments);
release_places:
    PyBuffer_Release(&places);
    if (done < 0) return NULL;
    Py_RETURN_NONE;
}

/* The word with a member more, as `_join_word` makes it; the word itself if it has it. 0 when it takes a bitmap. */
static int64_t join(const Table *t, int64_t word, int64_t member) {
    if (word < 0) {
        Py_ssize_t set = ~word & ((1 << PLACE_BITS) - 1);
        return set < t->sets && t->pool[set * t->words + (member >> 6)] >> (member & 63) & 1 ? word : 0;
    }
    int64_t joined = member + 1;
    int fields = 1;
    for (int i = 0; i < FIELDS; i++) {
        int64_t field = word >> i * FIELD_BITS & ((1 << FIELD_BITS) - 1);
        if (field == member + 1) return word;
        if (field == 0) continue;
        if (fields == FIELDS) return 0;
        joined |= field << fields++ * FIELD_BITS;
    }
    return joined;
}

/* 1 when everything is entered, 0 when nothing is, because a set takes a bitmap; -1 with an exception. `place` has room
   for a place of each key; bitmaps that keys no longer name, since they had to go, are appended to `released`. */
static int enter_all(Table *t, const int64_t *keys, Py_ssize_t count, int64_t member, int64_t tick, int64_t *place,
                     PyObject *released) {
    Py_ssize_t missing = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t bucket = keys[i] & t->mask;
        if (i + ROUND < count) PREFETCH(&t->keys[(keys[i + ROUND] & t->mask) * WAYS]);
        place[i] = -1;
        for (Py_ssize_t way = 0; way < WAYS && place[i] < 0; way++)
            if (t->keys[bucket * WAYS + way] == keys[i]) place[i] = bucket * WAYS + way;
        missing += place[i] < 0;
        PREFETCH(&t->members[bucket * WAYS]);
        PREFETCH(&t->uses[bucket * WAYS]);
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (place[i] >= 0 && !join(t, t->members[place[i]], member)) return 0;
    int64_t last_age = -1;
    double faded = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (place[i] < 0) continue;
        int64_t word = t->members[place[i]], joined = join(t, word, member);
        if (joined != word) STORE(t->members[place[i]], joined);
        int64_t use = t->uses[place[i]], age = tick - (use >> COUNT_BITS);
        if (age != last_age) faded = exp((double)age * (-1.0 / HORIZON));
        last_age = age;
        double uses = faded * (double)(use & COUNT_MASK) + COUNT_UNIT;
        STORE(t->uses[place[i]], (uses < COUNT_MASK ? (int64_t)uses : COUNT_MASK) | tick << COUNT_BITS);
    }
    if (missing) STORE(t->cells[INSERTED], t->cells[INSERTED] + missing);
    /* From the last to the first: of those that meet in a bucket, the order in which the Python twin takes them. */
    for (Py_ssize_t i = count - 1; i >= 0; i--) {
        if (place[i] >= 0) continue;
        Py_ssize_t bucket = keys[i] & t->mask, oldest = bucket * WAYS;
        int64_t least = INT64_MAX;
        for (Py_ssize_t at = bucket * WAYS; at < (bucket + 1) * WAYS; at++) {
            int64_t use = t->keys[at] ? t->uses[at] : 0;
            if (use < least) least = use, oldest = at;
        }
        if (t->keys[oldest] && t->members[oldest] < 0) {
            PyObject *set = PyLong_FromLongLong(~t->members[oldest] & ((1 << PLACE_BITS) - 1));
            int done = set == NULL ? -1 : PyList_Append(released, set);
            Py_XDECREF(set);
            if (done < 0) return -1;
        }
        STORE(t->sequence[bucket], t->sequence[bucket] + 1);
        STORE(t->keys[oldest], 0);
        STORE(t->members[oldest], member + 1);
        STORE(t->uses[oldest], tick << COUNT_BITS | COUNT_UNIT);
        STORE(t->keys[oldest], keys[i]);
        STORE(t->sequence[bucket], t->sequence[bucket] + 1);
    }
    return 1;
}

static PyObject *add(Table *t, PyObject *const *arguments, Py_ssize_t given) {
    Py_buffer keys;
    if (given != 3) return PyErr_Format(PyExc_TypeError, "add(keys, member, tick)");
    int64_t member = PyLong_AsLongLong(arguments[1]), tick = PyLong_AsLongLong(arguments[2]);
    if (PyErr_Occurred()) return NULL;
    for (int i = 0; i < ARRAYS; i++)
        if (t->held[i].readonly) return PyErr_Format(PyExc_ValueError, "a table that is only read");
    if (member < 0 || member >= t->words * 64 || tick < 0) return PyErr_Format(PyExc_ValueError, "no such member");
    if (cells(arguments[0], &keys, 0) < 0) return NULL;
    PyObject *released = PyList_New(0);
    int64_t *place = PyMem_Malloc((size_t)keys.len + 1);
    int done = -1;
    if (place == NULL) PyErr_NoMemory();
    else if (released != NULL) done = enter_all(t, keys.buf, keys.len / 8, member, tick, place, released);
    PyMem_Free(place);
    PyBuffer_Release(&keys);
    if (done > 0) return released;
    Py_XDECREF(released);
    if (done < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *make(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(named)) {
    PyObject *from[ARRAYS];
    if (!PyArg_ParseTuple(arguments, "OOOOOO:Table", &from[0], &from[1], &from[2], &from[3], &from[4], &from[5]))
        return NULL;
    Table *t = (Table *)type->tp_alloc(type, 0);
    if (t == NULL) return NULL;
    for (int i = 0; i < ARRAYS; i++) {
        if (PyObject_GetBuffer(from[i], &t->held[i], PyBUF_C_CONTIGUOUS | PyBUF_ND) < 0) goto refuse;
        if (t->held[i].len % 8 || (uintptr_t)t->held[i].buf % 8) goto unfit;
    }
    t->cells = t->held[0].buf;
    t->sequence = t->held[1].buf;
    t->keys = t->held[2].buf;
    t->members = t->held[3].buf;
    t->uses = t->held[4].buf;
    t->pool = t->held[5].buf;
    Py_ssize_t buckets = t->held[1].len / 8;
    t->mask = buckets - 1;
    if (t->held[0].len / 8 <= INSERTED || buckets < 1 || buckets & t->mask || t->held[5].ndim != 2) goto unfit;
    for (int i = 2; i < 5; i++)
        if (t->held[i].len / 8 != buckets * WAYS) goto unfit;
    t->sets = t->held[5].shape[0];
    t->words = t->held[5].shape[1];
    if (t->words < 1 || t->words > MOST_WORDS || t->held[5].len / 8 != t->sets * t->words) goto unfit;
    return (PyObject *)t;
unfit:
    PyErr_SetString(PyExc_ValueError, "these arrays are not those of one table");
refuse:
    Py_DECREF(t);
    return NULL;
}

static void let_go(Table *t) {
    PyTypeObject *type = Py_TYPE(t);
    for (int i = 0; i < ARRAYS; i++) PyBuffer_Release(&t->held[i]);
    Py_XDECREF(t->before_load);
    Py_XDECREF(t->before_store);
    type->tp_free(t);
    Py_DECREF(type);
}

static PyObject *set_before_load(Table *t, PyObject *call) {
    Py_XSETREF(t->before_load, Py_IsNone(call) ? NULL : Py_NewRef(call));
    Py_RETURN_NONE;
}

static PyObject *set_before_store(Table *t, PyObject *call) {
    Py_XSETREF(t->before_store, Py_IsNone(call) ? NULL : Py_NewRef(call));
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"find", (PyCFunction)(void (*)(void))find, METH_FASTCALL, "See _table.pyi."},
    {"reach", (PyCFunction)(void (*)(void))reach, METH_FASTCALL, "See _table.pyi."},
    {"uses", (PyCFunction)(void (*)(void))uses, METH_FASTCALL, "See _table.pyi."},
    {"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, "See _table.pyi."},
    {"before_store", (PyCFunction)set_before_store, METH_O, "See _table.pyi."},
    {"before_load", (PyCFunction)set_before_load, METH_O, "See _table.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, make},
    {Py_tp_dealloc, let_go},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {"shm.hashtable._table.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT, slots};

static int fill(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL) return -1;
    int done = PyModule_AddObjectRef(module, "Table", type);
    Py_DECREF(type);
    return done;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "shm.hashtable._table", NULL, 0, NULL, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__table(void) {
    return PyModuleDef_Init(&module);
}
