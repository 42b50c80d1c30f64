"""The compiled twins of a few hot functions; all else is in pyproject.toml. Without a compiler there are none, and
everything works (`shm/compiled.py`)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("shm.hashtable._table", ["shm/hashtable/_table.c"], optional=True),
        Extension("broker.prefix._keys", ["broker/prefix/_keys.c"], optional=True),
    ]
)
