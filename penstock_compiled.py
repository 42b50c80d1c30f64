"""The compiled build of a checkout, which every Python of .venv prefers while it is made of the sources that are there.

    build/compiled/                                  what is in a wheel, extension modules included (setup.py)
    build/compiled/sources                           size and time of every source that it was made of
    .venv/…/site-packages/penstock_compiled.py       leads here
    .venv/…/site-packages/penstock_compiled.pth      imports it whenever a Python starts

So nobody runs what a source said before it was edited: from the first edit on the sources themselves run, slower, until
the build is made anew (`make install`, `make run`). `PENSTOCK_COMPILED=0` has the sources run in any case. Tests run
over the sources, unless told otherwise (`make test`).

Imported, this must be quick and must not fail: it is part of the start of each process.
"""

import os
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))
COMPILED = os.path.join(ROOT, "build", "compiled")
MADE_OF = os.path.join(COMPILED, "sources")
PACKAGES = ("shm", "broker", "frontend")
NAME = "penstock_compiled"


def sources() -> str:
    """Every file that the build depends on, with its size and time."""
    found = [os.path.join(ROOT, name) for name in ("pyproject.toml", "setup.py")]
    for package in PACKAGES:
        for folder, _, names in os.walk(os.path.join(ROOT, package)):
            found += [os.path.join(folder, name) for name in names if not name.endswith((".pyc", ".so"))]
    lines = []
    for path in sorted(found):
        state = os.stat(path)
        lines.append(f"{state.st_size} {state.st_mtime_ns} {os.path.relpath(path, ROOT)}\n")
    return "".join(lines)


def is_fresh() -> bool:
    try:
        with open(MADE_OF) as file:
            return file.read() == sources()
    except (OSError, ValueError):  # there is none; or a source went away in the middle of this
        return False


def is_wanted() -> bool:
    return os.environ.get("PENSTOCK_COMPILED") != "0"


def make() -> None:
    """Makes the build, if it is wanted and not there, and has the Python that runs this prefer it."""
    import contextlib
    import fcntl
    import sysconfig

    if not is_wanted():
        return
    site = sysconfig.get_path("purelib")
    with open(os.path.join(site, f"{NAME}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would take each other's files away
        if not is_fresh():
            _build()
    link = os.path.join(site, f"{NAME}.py")
    if not os.path.exists(link):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(os.path.realpath(__file__), link)
    with open(os.path.join(site, f"{NAME}.pth"), "w") as file:
        # Not if it is gone: another commit may be checked out, which knows nothing of this.
        file.write(f"import importlib.util; importlib.util.find_spec({NAME!r}) and __import__({NAME!r})\n")


def _build() -> None:
    import shutil
    import subprocess

    print("compiling the request path: a minute, once for each change of the sources", flush=True)
    made_of = sources()  # of before: what is edited meanwhile is not in it
    shutil.rmtree(os.path.join(ROOT, "build"), ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", COMPILED, ROOT], check=True)
    if not any(name.startswith("penstock__mypyc.") for name in os.listdir(COMPILED)):  # setup.py says why, to pip alone
        print("the request path could not be compiled (is there a C compiler?); it runs as it is, slower")
    with open(MADE_OF, "w") as file:
        file.write(made_of)


if __name__ == "__main__":
    make()
elif is_wanted() and is_fresh():
    sys.path.append(COMPILED)  # the way to the sources is looked at last of all: setuptools makes it so
