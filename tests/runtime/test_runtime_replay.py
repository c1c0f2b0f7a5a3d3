"""A call that only takes memory and starts kernels is repeated from its recording; any other is run again."""

import gc
import weakref

import pytest
import torch

from flexmask.runtime.replay import MOST_REPLAYS, Recording, Replays, Watched


class Doubling:
    """Stands in for a Triton function and what it compiles to: out = 2 * x * (table or 1), by address."""

    params = ()

    def __init__(self):
        self.started, self.memory = [], {}

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled(grid, args)

    def compiled(self, grid, args):
        self.started.append((grid, args))
        return Compiled(self)


class Compiled:
    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return lambda *args: self.function.started.append((grid, args))


class Descriptor:
    """As TMA descriptors are: a tensor and how to cut it."""

    def __init__(self, base, block_shape):
        assert block_shape, "checked at a price"
        self.base, self.block_shape = base, block_shape


@pytest.fixture
def kernel():
    return Watched(Doubling())


def call(kernel, x, table, describe=False):
    out = torch.empty_like(x)
    kernel[(3,)](Descriptor(x, [16]) if describe else x, out, table, 7, (table, 5), None)
    return (out, None)


def recorded(kernel, x, table, **options):
    with Recording() as recording:
        results = call(kernel, x, table, **options)
    return recording.replay((x,), results)


def test_a_replay_starts_the_same_kernel_for_other_tensors(kernel):
    table, x = torch.ones(4), torch.randn(2, 8)
    replay = recorded(kernel, x, table)
    y = torch.randn(2, 8)
    out, nothing = replay.run((y,))
    assert (out.shape, out.stride(), out.dtype, nothing) == (x.shape, x.stride(), x.dtype, None)
    grid, arguments = kernel.function.started[-1]
    constant = table.data_ptr()
    assert (grid, arguments) == ((3, 1, 1), (y.data_ptr(), out.data_ptr(), constant, 7, (constant, 5), None))


def test_descriptors_are_made_anew_with_the_tensor(kernel):
    replay = recorded(kernel, torch.randn(2, 8), torch.ones(4), describe=True)
    y = torch.randn(2, 8)
    replay.run((y,))
    described = kernel.function.started[-1][1][0]
    assert isinstance(described, Descriptor) and described.base is y and described.block_shape == [16]


def test_memory_that_was_zeroed_is_zeroed_again(kernel):
    with Recording() as recording:
        total = torch.zeros(4, 4)
        kernel[(1,)](total)
    replay = recording.replay((), (total,))
    (found,) = replay.run(())
    assert found is not total and (found == 0).all()


def test_what_torch_computes_is_not_repeated(kernel):
    x = torch.randn(2, 8)
    with Recording() as recording:
        results = call(kernel, x.t().contiguous(), torch.ones(4))
    assert recording.replay((x,), results) is None


@pytest.mark.parametrize("within", ["the input", "memory that was taken", "a tuple", "a descriptor"])
def test_a_part_of_a_tensor_is_not_taken_for_a_constant(kernel, within):
    x = torch.randn(2, 8)
    with Recording() as recording:
        out = torch.empty(2, 8)
        part = (out if within == "memory that was taken" else x)[1]
        given = {"a tuple": (part, 5), "a descriptor": Descriptor(part, [8])}.get(within, part)
        kernel[(3,)](x, out, given)
    assert recording.replay((x,), (out,)) is None


def test_one_tensor_twice_says_nothing_of_two(kernel):
    x = torch.randn(2, 8)
    with Recording() as recording:
        results = call(kernel, x, torch.ones(4))
    assert recording.replay((x, x), results) is None


def test_a_result_must_be_memory_that_the_call_took(kernel):
    x = torch.randn(2, 8)
    with Recording() as recording:
        call(kernel, x, torch.ones(4))
    assert recording.replay((x,), (x,)) is None
    assert recording.replay((x,), (torch.randn(2),)) is None


def test_addresses_that_no_kernel_was_compiled_for(kernel):
    x, odd = torch.randn(2, 8), torch.randn(17)[1:].view(2, 8)
    assert recorded(kernel, odd, torch.ones(4)) is None
    assert recorded(kernel, x, torch.ones(4)).run((odd,)) is None


def test_nothing_is_recorded_where_no_gpu_is():
    replays, x, runs = Replays(), torch.randn(2, 8), []
    for _ in range(MOST_REPLAYS + 2):
        assert replays.run((1.0,), (x,), lambda: runs.append(0) or (x,)) == ((x,), None)
    assert len(runs) == MOST_REPLAYS + 2


@pytest.fixture
def replays(monkeypatch):
    """As if there were kernels to start."""
    monkeypatch.setattr(Replays, "_starts_kernels", staticmethod(lambda inputs: True))
    return Replays()


def repeated(replays, kernel, x, table, maps=(), given=()):
    """How often the call itself ran, and what was started last."""
    runs = []

    def run():
        runs.append(0)
        out = torch.empty_like(x)
        kernel[(3,)](x, out, *maps, (table, table.stride(0), 5))
        return (out,)

    standing = replays.standing([{str(n): each for n, each in enumerate(maps)}], [table])
    (out,), _ = replays.run(given, (x,), run, standing)
    return len(runs), out, kernel.function.started[-1][1]


def test_the_third_call_of_a_layout_is_a_repetition_whatever_map_and_tables_it_has(replays, kernel):
    for ran in (1, 1, 0, 0):
        x, table, maps = torch.randn(2, 8), torch.ones(4), (torch.ones(3), torch.ones(3), None)
        maps = (*maps[:2], maps[0])  # one tensor in two places
        found, out, started = repeated(replays, kernel, x, table, maps)
        assert found == ran
        if not ran:
            assert started == (*[t.data_ptr() for t in (x, out, *maps)], (table.data_ptr(), 1, 5))


@pytest.mark.parametrize("other", ["a shape", "a stride", "an address that is not aligned", "one tensor for two", "a number", "-0.0"])
def test_another_layout_is_another(replays, kernel, other):
    x, table, maps = torch.randn(2, 8), torch.ones(4), (torch.ones(3), torch.ones(3))
    for _ in range(3):
        found, *_ = repeated(replays, kernel, x, table, maps, given=(0.0, 1))
    assert found == 0
    given = {"a number": (0.0, 2), "-0.0": (-0.0, 1)}.get(other, (0.0, 1))
    if other == "a shape":
        maps = (torch.ones(4), maps[1])
    if other == "a stride":
        table = torch.ones(8)[::2]
    if other == "an address that is not aligned":
        table = torch.ones(5)[1:]
    if other == "one tensor for two":
        maps = (maps[0], maps[0])
    assert repeated(replays, kernel, x, table, maps, given)[0] == 1


def test_a_map_with_a_part_of_its_own_is_not_repeated(replays, kernel):
    x, whole = torch.randn(2, 8), torch.ones(8)

    def run():
        out = torch.empty_like(x)
        kernel[(3,)](x, out, whole[4:])
        return (out,)

    for _ in range(3):
        replays.run((), (x,), run, replays.standing([{"whole": whole}], []))
    assert list(replays.kept.values()) == [None]


def test_only_so_many_layouts_are_kept(replays, kernel):
    for n in range(1, MOST_REPLAYS + 10):
        for _ in range(2):
            repeated(replays, kernel, torch.randn(n, 8), torch.ones(4))
    assert len(replays.kept) == MOST_REPLAYS


def test_tables_are_not_kept_alive(replays, kernel):
    for _ in range(3):
        table = torch.ones(4)
        repeated(replays, kernel, torch.randn(2, 8), table)
    gone = weakref.ref(table)
    del table
    kernel.function.started.clear()
    gc.collect()
    assert gone() is None


def test_a_watched_function_is_the_function_otherwise(kernel):
    assert kernel.memory == {} and kernel.params == ()
