"""Launches with arguments packed once: what the driver is handed, and when it is left to Triton."""

import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexmask.runtime import driver

ROOT = Path(__file__).parent.parent.parent
TRITONS = ["", *[str(path) for path in [ROOT / ".triton-next"] if path.is_dir()]]


@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: Path(path).name or "installed")
def test_parameters_are_as_long_as_the_compiler_made_them(triton):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [triton, str(ROOT)]))
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("driver_cases.py")]
    sizes = json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)
    assert sizes["ours"] == sizes["theirs"] and 128 in sizes["ours"]


class FakeCuda:
    """Keeps what is launched. A descriptor is its address and its box here."""

    def __init__(self, sizes):
        self.sizes, self.launched = sizes, []

    def parameter_sizes(self, function):
        return self.sizes

    def encode(self, at, address, described):
        assert at % 64 == 0, "the driver wants descriptors aligned"
        ctypes.memmove(at, struct.pack("Q4i", address, *described.box, *described.shape[:2]), 24)

    def replace_address(self, at, address):
        ctypes.memmove(at, struct.pack("Q", address), 8)

    def launch(self, function, grid, threads, shared, stream, parameters):
        table = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        packed = [ctypes.string_at(at, size) for at, size in zip(table, self.sizes, strict=True)]
        self.launched.append((function, grid, threads, shared, stream, packed))


META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 8], "fp4_padded": False}
SIGNATURE = {"x": "tensordesc<bf16[16, 8]>", "out": "*bf16", "mods": ("*fp32", "i32"), "n": "i32", "scale": "fp32", "none": "constexpr"}
SIZES = [128, 4, 4, 8, 8, 8, 8, 4, 4, 4, 8, 8]


def compiled(signature=SIGNATURE, meta=META, **special):
    metadata = {"num_ctas": 1, "tensordesc_meta": [meta], "global_scratch_size": 0, "profile_scratch_size": 0, "launch_pdl": False}
    return SimpleNamespace(
        src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(**metadata | special), function=77, packed_metadata=(12, 1, 4096)
    )


def described(base, padding="zero"):
    return SimpleNamespace(base=base, shape=[64, 32], strides=[32, 1], padding=padding, block_shape=[16, 8])


def given(x, out, table):
    return (described(x), out, (table, 5), 1000, 0.5, None)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(SIZES)
    monkeypatch.setattr(driver, "cuda", lambda: fake)
    return fake


def test_addresses_are_patched_and_all_else_stays(cuda):
    x, out, table = torch.zeros(64, 32), torch.zeros(64, 32), torch.zeros(4)
    launch = driver.direct(compiled(), (3, 2, 1), given(x, out, table), {(0,): 0, (1,): 1})
    for addresses in ((160, 320), (1 << 40, 3200)):
        launch.run(addresses, 9)
        function, grid, threads, shared, stream, packed = cuda.launched[-1]
        assert (function, grid, threads, shared, stream) == (77, (3, 2, 1), 384, 4096, 9)
        assert struct.unpack("Q4i", packed[0][:24]) == (addresses[0], 16, 8, 64, 32)
        assert struct.unpack("2i", b"".join(packed[1:3])) == (64, 32)
        assert struct.unpack("2q", b"".join(packed[3:5])) == (32, 1)
        assert struct.unpack("QQiif", b"".join(packed[5:10])) == (addresses[1], table.data_ptr(), 5, 1000, 0.5)
        assert packed[10:] == [bytes(8)] * 2


def test_addresses_within_tuples_are_patched_too(cuda):
    x, out, table = torch.zeros(64, 32), torch.zeros(64, 32), torch.zeros(4)
    launch = driver.direct(compiled(), (3, 2, 1), given(x, out, table), {(0,): 0, (2, 0): 1})
    launch.run((160, 4800), 9)
    packed = cuda.launched[-1][-1]
    assert struct.unpack("QQi", b"".join(packed[5:8])) == (out.data_ptr(), 4800, 5)


def test_what_does_not_change_keeps_its_own_address(cuda):
    x, out, table = torch.zeros(64, 32), torch.zeros(64, 32), torch.zeros(4)
    launch = driver.direct(compiled(), (1, 1, 1), given(x, out, table), {})
    launch.run((), 0)
    packed = cuda.launched[-1][-1]
    assert struct.unpack("Q", packed[0][:8]) == (x.data_ptr(),) and struct.unpack("Q", packed[5]) == (out.data_ptr(),)


PLAIN = {
    "out": "*i32",
    "mods": ("*fp32", "constexpr", "i32"),
    "n": "i32",
    "flag": "i1",
    "far": "i64",
    "none": "constexpr",
    "BLOCK": "constexpr",
}


def test_arguments_of_the_same_types_are_packed_anew(monkeypatch):
    fake = FakeCuda([8, 8, 4, 4, 1, 8, 8, 8])
    monkeypatch.setattr(driver, "cuda", lambda: fake)
    tensors = [torch.zeros(3) for _ in range(4)]
    launch = driver.packed(compiled(PLAIN), (tensors[0], (tensors[1], 1, 5), 10, False, 1 << 40, None, 64))
    launch.run((7, 1, 1), (tensors[2], (tensors[3], 1, -6), 11, True, 1 << 41, None, 64), 3)
    function, grid, _, _, stream, packed = fake.launched[-1]
    assert (function, grid, stream) == (77, (7, 1, 1), 3)
    assert struct.unpack("=QQiibq", b"".join(packed[:6])) == (tensors[2].data_ptr(), tensors[3].data_ptr(), -6, 11, 1, 1 << 41)
    assert packed[6:] == [bytes(8)] * 2
    with pytest.raises(struct.error):
        launch.run((7, 1, 1), (tensors[2], (tensors[3], 1, 1 << 40), 11, True, 1 << 41, None, 64), 3)


def test_tuples_within_tuples_and_descriptors_are_not_packed_anew(cuda):
    assert driver.packed(compiled(), given(*(torch.zeros(64, 32) for _ in range(3)))) is None
    cuda.sizes = [8, 8, 8]
    assert driver.packed(compiled({"x": (("*i32",),)}), (((torch.zeros(2),),),)) is None


LEFT_TO_TRITON = {
    "parameters of other sizes": (compiled(SIGNATURE | {"n": "i64"}), None),
    "a type of another kind": (compiled(SIGNATURE | {"scale": "bf16"}), None),
    "clusters": (compiled(num_ctas=2), None),
    "memory of its own": (compiled(global_scratch_size=128), None),
    "descriptors that the kernel makes": (compiled(tensordesc_meta=None), None),
    "half-byte numbers": (compiled(meta=META | {"fp4_padded": True}), None),
    "descriptors that read NaN outside": (compiled(), "nan"),
    "nothing compiled, as in the interpreter": (object(), None),
}


@pytest.mark.parametrize("case", LEFT_TO_TRITON)
def test_what_is_not_certain_is_left_to_triton(cuda, case):
    kernel, padding = LEFT_TO_TRITON[case]
    arguments = list(given(*(torch.zeros(64, 32) for _ in range(3))))
    if padding:
        arguments[0] = described(arguments[1], padding)
    assert driver.direct(kernel, (1, 1, 1), arguments, {}) is None


def test_without_a_driver_all_is_left_to_triton(monkeypatch):
    monkeypatch.setattr(driver, "cuda", lambda: None)
    assert driver.direct(compiled(), (1, 1, 1), given(*(torch.zeros(64, 32) for _ in range(3))), {}) is None


def test_hooks_into_launches_are_noticed(monkeypatch):
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    monkeypatch.setitem(sys.modules, "triton.knobs", SimpleNamespace(runtime=hooks))
    assert not driver.is_watched()
    hooks.launch_enter_hook.calls.append(print)
    assert driver.is_watched()
