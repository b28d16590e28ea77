"""Stops `make sanitize` where Python would import another build than the instrumented one."""

from pathlib import Path

from pyext import _C

if b"__asan_init" not in Path(_C.__file__).read_bytes():
    raise SystemExit(f"{_C.__file__} is not built with PYEXT_SANITIZE: this run would show nothing")
