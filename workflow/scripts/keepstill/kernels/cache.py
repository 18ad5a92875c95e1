"""Where compiled kernels are kept: a folder of their own for each kind of processor and version.

Numba's own cache has one folder for all, numbers a function's variants, and takes the next number
that is free in an index which it read before: of two processes that add a variant at the same
time, one may find the other's machine code under its own name. Here every process gives its files
names of their own, so an index that loses such a race lacks a variant, and never has a wrong one.
Numba's cache knows a source file that was edited, but not one that was edited elsewhere and is
compiled into its callers; here the folder's name holds a hash of all of them.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
import platform
import sys
import tempfile
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
from llvmlite import binding
from numba.core import caching, environment
from numba.core.runtime.nrt import rtsys

_FunctionCache: Any = caching.FunctionCache  # its stubs are incomplete
_IndexDataCacheFile: Any = caching.IndexDataCacheFile
_CompileResultCacheImpl: Any = caching.CompileResultCacheImpl

SOURCES = Path(__file__).parent
WARM = "warm"  # in a folder in which `warm.warm_kernels` has run to its end
_PROCESS = uuid.uuid4().hex[:12]


@functools.cache
def cache_dir() -> Path | None:
    """Folder of this processor's kernels; None if none can be written to or read from.

    The first that is warm or can be written to: below NUMBA_CACHE_DIR, beside the sources, below
    the user's folder for caches, below a folder of the user's in that for temporary files. So an
    install that is only read serves those who warmed it before, and others compile elsewhere.
    """
    kind = cpu_kind()
    return next((base / kind for base in _bases() if _is_of_use(base, kind)), None)


@functools.cache
def cpu_kind() -> str:
    """Name of all that compiled kernels depend on: processor, versions and sources."""
    config: Any = numba.config
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    versions = platform.python_version(), numba.__version__, llvmlite.__version__
    digest = hashlib.sha256(repr((cpu, features, platform.machine(), versions)).encode())
    for path in sorted(SOURCES.glob("*.py")):
        if path.name == "cache.py":
            continue
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{cpu}-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that want the same; the kernel frees it with ours."""
    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a disk without locks: then work is done twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kept(dispatcher: Any, function: Callable[..., Any]) -> Any:
    """A function that numba compiles, its machine code kept in `cache_dir`, if there is one."""
    if cache_dir() is not None and hasattr(dispatcher, "enable_caching"):
        dispatcher._cache = _KernelCache(function)
    return dispatcher


class _Locator:
    """What numba's cache asks where a function's code is kept."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self._lineno, self._py_file = function.__code__.co_firstlineno, file

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "_Locator":
        return cls(function, file)

    def get_cache_path(self) -> str:
        return str(cache_dir())

    def ensure_cache_path(self) -> None:
        """`cache_dir` has made it."""

    def get_source_stamp(self) -> str:
        return cpu_kind()

    def get_disambiguator(self) -> str:
        return str(self._lineno)


class _Implementation(_CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        """A kernel from what was kept, its library asked for the symbols that calls need.

        Numba lists all symbols of each library, some hundred, a call to LLVM each (0.03 s a
        process).
        """
        engine, described = target_context.codegen()._engine, payload[1]
        wanted = described.llvm_func_name, described.llvm_cpython_wrapper_name
        engine._load_defined_symbols = lambda library: engine._defined_symbols.update(
            name for name in wanted if _defines(library, name)
        )
        try:
            return super().rebuild(target_context, payload)
        finally:
            del engine._load_defined_symbols


def _defines(library: Any, name: str) -> bool:
    """Whether a function of some name is in a library, and not only declared."""
    try:
        return not library.get_function(name).is_declaration
    except NameError:
        return False


class _Unpickler(pickle.Unpickler):
    """Reads what was kept, but imports no part of numba that only compiling needs (0.02 s)."""

    def find_class(self, module: str, name: str) -> Any:
        """As pickle has it."""
        if (module, name) == (environment.__name__, "_rebuild_env"):
            return _environment
        return super().find_class(module, name)


def _environment(module: str, constants: list[Any], name: str) -> Any:
    """Constants of a compiled function of some module, which need not be imported."""
    known: Any = environment.Environment._memo
    if name in known:
        return known[name]
    with_globals: dict[str, Any] = vars(sys.modules.get(module, types.ModuleType(module)))
    made: Any = environment.Environment(with_globals)
    made.consts[:] = constants
    made.env_name = name
    known[name] = made
    return made


class _Files(_IndexDataCacheFile):  # type: ignore[misc]
    """Index and data of one function."""

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            return _Unpickler(file).load()


class _KernelCache(_FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, in our folder, under names of this process."""

    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        source_stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, source_stamp)
        self._cache_file._data_name_pattern = (
            f"{self._impl.filename_base}.{{number}}-{_PROCESS}.nbc"
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What is kept, run without all that numba would need to compile (0.15 s a process)."""
        rtsys.initialize(target_context)
        return self._load_overload(sig, target_context)

    def signatures(self, target_context: Any) -> list[Any]:
        """Arguments for which something is kept for this processor."""
        codegen = target_context.codegen()
        keys = self._cache_file._load_index()
        return [key[0] for key in keys if key == self._index_key(key[0], codegen)]

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled; where that cannot be (only read, full), it costs time only."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def load_kept(kernel: Any) -> None:
    """Load what is kept of a kernel, for all arguments that it was compiled for.

    Its first call would do so; a process that waits can do it before.
    """
    if isinstance(cache := getattr(kernel, "_cache", None), _KernelCache):
        for signature in cache.signatures(kernel.targetctx):
            kernel.compile(signature)


def _bases() -> Iterator[Path]:
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(given).absolute() / "keepstill"
    yield SOURCES / "__pycache__"
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keepstill"
    own = Path(tempfile.gettempdir()) / f"keepstill-kernels-{os.getuid()}"
    with contextlib.suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        status = own.lstat()
        # Others may write beside it; what lies in it is run.
        if (
            status.st_uid == os.getuid()
            and status.st_mode & 0o777 == 0o700
            and not own.is_symlink()
        ):
            yield own


def _is_of_use(base: Path, kind: str) -> bool:
    folder = base / kind
    with contextlib.suppress(OSError):
        if (folder / WARM).exists():
            return True
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False
