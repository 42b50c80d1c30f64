/* What the events of a flowing stream come to: bytes from an engine, looked at, counted, and sent to the client. Whatever
   is out of the ordinary is handed back untouched to those whose business it is (conduit.py). tests/frontend/test_conduit.py

   A few hundred streams in turn push each other out of the caches, so that an event costs what memory it touches and not
   what is computed: here it touches one object of a line or two, and buffers that all events share. */

#ifndef PENSTOCK_CONDUIT_H
#define PENSTOCK_CONDUIT_H

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#pragma GCC visibility push(hidden)

enum { NONE = -1 };
enum { READ_BYTES = 64 * 1024 }; /* of an engine at once, and the most that an event may have */
enum { ENDING = 4 };

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

/* What was read, as far as it is counted. */
typedef struct {
    Py_ssize_t size, events;
    Ending ending;
} Count;

/* Events in the body of a chunk, as frontend/forward.py counts them. */
Py_ssize_t events_in(const char *data, Py_ssize_t size);

void end_with(Ending *ending, const char *data, Py_ssize_t size);

/* `data`: what the count is of. */
void note(Conduit *to, const Count *count, const char *data, Py_ssize_t length, double now);

/* Sends to the client. Returns how much its socket did not take; errors are the transport's to meet. */
Py_ssize_t send_to(const Conduit *to, const char *data, Py_ssize_t length);

extern PyTypeObject ConduitType, ConduitsType, IntakeType; /* _conduit.c, _step.c, _intake.c */

/* A native engine's step (_step.c); see _conduit.pyi. */
PyObject *step(PyObject *module, PyObject *arguments);

#pragma GCC visibility pop
#endif
