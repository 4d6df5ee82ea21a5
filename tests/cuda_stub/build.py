"""Building the stub of the CUDA runtime, and running Python over it.

``stub.c`` has what is written by hand. Every other function that PyTorch's libraries want of CUDA's gets a
body here, by its name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = 13  # the major version whose functions stub.c has: their arguments differ from one to the next

LIBRARY = "libcuda_stub.so"
STUB = "CUDA_STUB"  # in the environment: the library's path, for who asks it for counts

SUITES = "cublas|cudnn|cusparse|cusolver|cufft|curand"
OF_CUDA = re.compile(rf"__cuda|cuda|cu[A-Z]|{SUITES}")
# What no step calls, in libraries of its own that are there.
LEFT_ALONE = re.compile(r"cuFile|cusparseLt|cupti")
# They say things that only the real libraries know, and need no device.
REAL = {
    "cublasLtGetVersion",
    "cudnnGetCudartVersion",
    "cudnnGetErrorString",
    "cudnnGetLastErrorString",
    "cudnnGetVersion",
}
# Functions of the suites that compute nothing, by a word in their names.
SETS_UP = re.compile(
    "Create|Destroy|Get|Set|Desc|Attribute|Layout|Preference|Check|Init|Version|Plan|Make|bufferSize|Estimate"
)


def hindrance() -> str | None:
    """Why the stub cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return f"the CUDA stub needs Linux, found {sys.platform}"
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"the CUDA stub is built with gcc and binutils, found no {tool}"
    if torch.version.cuda is None:
        return "the CUDA stub needs a PyTorch for CUDA, found one without"
    if int(torch.version.cuda.partition(".")[0]) != CUDA:
        return f"the CUDA stub knows CUDA {CUDA}, found a PyTorch for CUDA {torch.version.cuda}"
    if _headers("cuda_runtime_api.h") is None or _headers("cudnn.h") is None:
        return "the CUDA stub is built with the headers in PyTorch's wheels, found none"
    return None


def build(folder: Path) -> Path:
    """Build the stub in ``folder``; the library's path. Raises CalledProcessError where that fails."""
    by_hand, rest, library = folder / "stub.o", folder / "rest.c", folder / LIBRARY
    places = [HERE / "include", _headers("cuda_runtime_api.h"), _headers("cudnn.h")]
    including = [argument for place in places for argument in ("-I", str(place))]
    compiling = ["gcc", "-O1", "-fPIC", "-Wall", "-Wno-deprecated-declarations"]
    _run(*compiling, *including, "-c", HERE / "stub.c", "-o", by_hand)
    written = set(_symbols("--defined-only", by_hand))
    rest.write_text("".join(_bodies(sorted(_wanted() - written - REAL))))
    _run(
        *compiling,
        "-Wno-builtin-declaration-mismatch",
        "-shared",
        by_hand,
        rest,
        "-o",
        library,
        "-ldl",
        "-lpthread",
    )
    (folder / "libcuda.so.1").symlink_to(library)  # the driver, which PyTorch opens by this name
    return library


def told(library: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """What cells.py tells when it is run with ``arguments`` over the stub, by name, in order.

    Raises RuntimeError if it does not come to its end.
    """
    environment = {
        **os.environ,
        STUB: str(library),
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        # A convolution is one call then, and no plan that is run; in bfloat16 it is many, and not cuDNN's.
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_stub.cells", *arguments],
        env=environment,
        cwd=library.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        printed = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        raise RuntimeError(f"cells.py {' '.join(arguments)} ended with {done.returncode}: {printed}")
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {record["name"]: record for record in records}


def _run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _headers(name: str) -> Path | None:
    """The folder of a header in the wheels that PyTorch brought."""
    beside = Path(torch.__file__).parent.parent / "nvidia"
    return next((path.parent for path in sorted(beside.glob(f"*/include/{name}"))), None)


def _symbols(which: str, *files: Path) -> Iterator[str]:
    for line in _run("nm", which, *files).splitlines():
        words = line.split()
        if len(words) > 1:
            yield words[-1].partition("@")[0]


def _wanted() -> set[str]:
    """Names of CUDA's functions that PyTorch's libraries call."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("*.so"))
    return {
        name
        for library in libraries
        for name in _symbols("-Du", library)
        if OF_CUDA.match(name) and not LEFT_ALONE.match(name)
    }


def _bodies(names: Sequence[str]) -> Iterator[str]:
    """C definitions of functions whose arguments nobody knows here: all of them succeed."""
    yield "#include <stdlib.h>\nint stub_library_call(const char *name);\n"
    for name in names:
        if not re.match(SUITES, name):
            yield f"int {name}(void) {{ return 0; }}\n"
        elif "Create" in name:  # a handle of any kind, that nothing looks into
            yield f"int {name}(void **handle) {{ *handle = calloc(1, 8192); return 0; }}\n"
        elif SETS_UP.search(name):
            yield f"int {name}(void) {{ return 0; }}\n"
        else:
            yield f'int {name}(void) {{ return stub_library_call("{name}"); }}\n'
