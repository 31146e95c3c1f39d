"""Compiling a Triton kernel for an H100 (sm_90) where there is none, and what is asked of the result."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = 227 * 1024  # bytes of shared memory a block may have on sm_90


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Collection[str] = (),
    **options: int,
) -> Any:
    """The kernel with these `constants`; other arguments are of `types` (Triton's names, *bf16), or int32.

    Pointers are aligned to 16 bytes, as tensors are; numbers named in `divisible` can be divided by 16, as Triton finds
    of strides.
    `options` are num_warps and num_stages.
    """
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", 90, 32), options
    )


def report(name: str, result: Any, wanted: str) -> None:
    """One line, after checks: it fits in shared memory, has the instructions `wanted`, keeps its registers."""
    assert result.metadata.shared <= SHARED, (name, result.metadata.shared)
    assert re.search(wanted, result.asm["ptx"]), f"{name}: no {wanted} in its code"
    spilled = spilled_bytes(result.asm["ptx"])
    assert spilled <= 256, f"{name}: {spilled} bytes of registers spilled"
    print(f"{name}: {result.metadata.shared} bytes of shared memory, {spilled} spilled")  # noqa: T201


def spilled_bytes(ptx: str) -> int:
    """Bytes of registers that the assembler stores to memory for want of room."""
    assembler = str(triton.knobs.nvidia.ptxas.path)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


def compile_apart(module: str, cache: Path) -> int:
    """Kernels that a program reports on. It is run apart, as Triton may be set to interpret them here."""
    root = Path(__file__).resolve().parent.parent
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", module], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.count("shared memory")
