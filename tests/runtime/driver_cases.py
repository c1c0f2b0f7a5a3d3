"""A kernel with every sort of parameter, compiled for a GPU that is not here. As a script, without TRITON_INTERPRET, it prints as JSON
the bytes that each takes by our account and by the compiled file's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flexmask.runtime.driver import parameters_of
from flexmask.templates.offline import _compiling_for


@triton.jit
def kernel(described, out, tables, numbers, missing, n, far, one, flag, slope, BLOCK: tl.constexpr):
    x = described.load([0, 0])
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if missing is not None:
        x += tl.load(missing)
    x += tl.load(tables[0] + far + one) + tl.load(tables[1]) * numbers[0] + flag
    tl.store(out + at, x * slope, mask=at < n)


def main() -> None:
    x, table = torch.zeros(64, 64), torch.zeros(8, dtype=torch.float16)
    given = (TensorDescriptor(x, [64, 64], [64, 1], [16, 16]), x, (x, table), (7, 2.5), None, 100, 1 << 40, 1, True, 0.5, 16)
    with _compiling_for(90):
        compiled = kernel.warmup(*given, grid=(1,))
    ours = [len(each.packed) for each in parameters_of(compiled.src.signature, compiled.metadata.tensordesc_meta, given)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-elf", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal\s*:\s*(\w+)\s+Offset\s*:\s*\w+\s+Size\s*:\s*(\w+)", text)
    theirs = [size for _, size in sorted((int(number, 16), int(size, 16)) for number, size in found)]
    json.dump({"ours": ours, "theirs": theirs}, sys.stdout)


if __name__ == "__main__":
    main()
