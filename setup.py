"""What is compiled; all else is in pyproject.toml. Without a compiler nothing is, and everything works.

* A few functions have twins in C beside them (`shm/compiled.py`).
* The request path itself: mypyc makes extension modules of the very source that is run without them. Only wheels have
  them: an extension module hides the source beside it, and who edits the source must not run what it was before.

`PENSTOCK_COMPILED=0` builds a wheel without the latter. What it buys: docs/performance.md, section 6.
"""

from __future__ import annotations

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

REQUEST_PATH = (
    "shm/cells.py",
    "shm/fence.py",
    "shm/seqlock.py",
    "broker/candidates.py",
    "broker/counters.py",
    "broker/lease.py",
    "broker/faces/estimate.py",
    "broker/lines.py",
    "broker/lookout.py",
    "broker/narrator.py",
    "broker/port.py",
    "broker/route.py",
    "broker/saturation.py",
    "broker/table_writer.py",
    "broker/vectors.py",
    "broker/view.py",
    "broker/zmtp.py",
    "broker/policies/draw.py",
    "broker/policies/cache_aware.py",
    "broker/policies/policy.py",
    "broker/policies/request_num.py",
    "broker/policies/round_robin.py",
    "broker/prefix/index.py",
    "broker/prefix/keys.py",
    "broker/policies/whole_prompts.py",
    "broker/scheduler/events.py",
    "broker/scheduler/subscriber.py",
    "frontend/account.py",
    "frontend/admission.py",
    "frontend/api.py",
    "frontend/body.py",
    "frontend/breaker.py",
    "frontend/client.py",
    "frontend/dispatch.py",
    "frontend/forward.py",
    "frontend/forwarder.py",
    "frontend/headers.py",
    "frontend/idle.py",
    "frontend/known_heads.py",
    "frontend/lean.py",
    "frontend/lifting.py",
    "frontend/outbox.py",
    "frontend/receiving.py",
    "frontend/request_head.py",
    "frontend/sending.py",
    "frontend/texts.py",
    "frontend/upstream/base.py",
    "frontend/upstream/http.py",
    "frontend/upstream/http_chunk.py",
    "frontend/upstream/http_connection.py",
    "frontend/upstream/http_intake.py",
    "frontend/upstream/http_pool.py",
    "frontend/upstream/http_response.py",
    "frontend/upstream/zmq.py",
    "frontend/upstream/zmq_call.py",
    "frontend/upstream/zmq_peers.py",
    "frontend/upstream/zmq_request.py",
)
"""Plain classes, protocols, enums and functions. What inherits from a class that is not compiled lives elsewhere: with
a `msgspec.Struct` nothing is gained, and msgspec cannot read what mypyc makes of annotations; an object whose base has
weak references (`logging.Handler`, uvicorn's protocol) leaves them dangling when it ends (mypyc 2.4). `make test` runs
over the build with an allocator that shows such things."""


DIRECT_CALLS = ["-fvisibility=hidden", "-fno-semantic-interposition", "-fno-plt"]
"""Within the library: nobody is to put other functions in the place of ours."""


def request_path() -> list[Extension]:
    """mypyc's extensions: one library, and a small module for each source that leads to it."""
    if "bdist_wheel" not in sys.argv or os.environ.get("PENSTOCK_COMPILED") == "0":
        return []
    # Types were checked before (`make check`), and not every library is there while a wheel is built.
    options = ["--config-file=", "--ignore-missing-imports"]
    try:
        from mypyc.build import mypycify

        found = list(mypycify([*options, *REQUEST_PATH], opt_level="3", debug_level="0", group_name="penstock"))
    except (Exception, SystemExit) as error:  # it may not be there, or a later one; a wheel without it is as good
        print(f"the request path is not compiled: {error}")
        return []
    for extension in found:
        extension.extra_compile_args += DIRECT_CALLS
    return found


class Build(build_ext):
    """The request path as a whole or not at all: each of its modules needs the library that comes first."""

    def build_extensions(self) -> None:
        alone = [extension for extension in self.extensions if extension.optional]
        path = [extension for extension in self.extensions if not extension.optional]
        self.extensions = alone
        super().build_extensions()
        self.extensions = path
        try:
            super().build_extensions()
        except (CCompilerError, ExecError, PlatformError) as error:
            self.warn(f"the request path is not compiled: {error}")
            path = []
        self.extensions = [*alone, *path]


setup(
    ext_modules=[
        Extension("shm._cells", ["shm/_cells.c"], optional=True),
        Extension("shm._rows", ["shm/_rows.c"], optional=True),
        Extension("shm.hashtable._table", ["shm/hashtable/_table.c"], optional=True),
        Extension("broker.prefix._keys", ["broker/prefix/_keys.c"], optional=True),
        Extension(
            "frontend._conduit",
            ["frontend/_conduit.c", "frontend/_intake.c", "frontend/_step.c"],
            depends=["frontend/_conduit.h"],
            optional=True,
        ),
        Extension("frontend._lift", ["frontend/_lift.c"], optional=True),
        Extension("frontend._send", ["frontend/_send.c"], optional=True),
        *request_path(),
    ],
    cmdclass={"build_ext": Build},
)
