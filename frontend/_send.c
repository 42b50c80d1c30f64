/* One non-blocking send(2): what a transport's `write` comes to when it holds nothing. tests/frontend/test_sending.py */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/socket.h>

/* Any error is 0 bytes: the transport, whose business errors are, meets it at its own attempt. */
static PyObject *send_now(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t arguments) {
    if (arguments != 2 || !PyBytes_Check(given[1])) return PyErr_Format(PyExc_TypeError, "send(descriptor, data)");
    long descriptor = PyLong_AsLong(given[0]);
    if (descriptor == -1 && PyErr_Occurred()) return NULL;
    /* The GIL is kept: nothing here waits, and a process has one thread that would ask for it. */
    ssize_t sent = send((int)descriptor, PyBytes_AS_STRING(given[1]), (size_t)PyBytes_GET_SIZE(given[1]),
                        MSG_DONTWAIT | MSG_NOSIGNAL);
    return PyLong_FromSsize_t(sent < 0 ? 0 : sent);
}

static PyMethodDef methods[] = {
    {"send", (PyCFunction)(void (*)(void))send_now, METH_FASTCALL, "See _send.pyi."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "frontend._send", NULL, 0, methods, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__send(void) {
    return PyModuleDef_Init(&module);
}
