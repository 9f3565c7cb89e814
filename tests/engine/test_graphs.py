"""How CUDA graphs are captured, with stand-ins for torch.cuda: streams, memory, random numbers, and what fails."""

import ast
import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastprior
from fastprior import draws
from fastprior.engine import graphs, steps
from fastprior.kernels import ops
from fastprior.kernels.gpu import workspace
from helpers import captures
from helpers.at_once import at_once

SECOND = torch.device("cuda:1")
DRAWS = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
DRAWS_ANYWHERE = {"bernoulli_", "exponential_", "normal_", "rand_like", "randint_like", "randn_like", "uniform_"}


class Cuda:
    """Pieces of torch.cuda that say what they were asked for, in `events`; nothing runs."""

    def __init__(self, monkeypatch):
        self.events, self.current, self.streams, self.pools = [], "default", 0, 0
        self.fails = False  # to end a capture
        for name in ("Stream", "current_stream", "stream", "device", "graph", "graph_pool_handle", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.note("clear"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)

    def note(self, *event) -> None:
        self.events.append(event if len(event) > 1 else event[0])

    def run(self) -> None:
        self.note("run", self.current)

    def Stream(self, device):
        self.streams += 1
        return SimpleNamespace(name=f"{device} stream {self.streams}", wait_stream=lambda other: self.note("wait"))

    def current_stream(self, device):
        return SimpleNamespace(name=self.current, wait_stream=lambda other: self.note("wait"))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def device(self, device):
        self.note("device", str(device))
        yield

    def graph_pool_handle(self):
        self.pools += 1
        return 0, self.pools

    def memory_reserved(self, device):
        return 100 * len(self.events)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        before, self.current = self.current, stream and stream.name
        self.note("begin", pool, self.current, capture_error_mode)
        try:
            yield
        finally:
            self.note("end")
            if self.fails:
                self.fails = False
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before

    def end_allocate(self, device: int, pool) -> None:
        self.note("end allocation", device, pool)


def no_capture_is_under_way() -> bool:
    """For another thread."""

    def take(_):
        taken = draws.capturing.acquire(blocking=False)
        if taken:
            draws.capturing.release()
        return taken

    return at_once(take, range(1)) == [True]


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_captures_have_a_stream_and_workspaces_of_their_own(cuda):
    """Of their own device; the second capture of a pool takes the stream of the first."""
    replay, pool, grown = graphs.capture(cuda.run, SECOND, None)
    on_stream, ours = ("run", "cuda:1 stream 1"), ("begin", (0, 1), "cuda:1 stream 1", "thread_local")
    wanted = ["wait", *[on_stream] * 3, "wait", ("device", "cuda:1"), "clear", ours, on_stream, "end", "clear"]
    assert cuda.events == wanted and grown > 0 and callable(replay)
    cuda.events.clear()
    assert graphs.capture(cuda.run, SECOND, pool)[1] is pool and cuda.events == wanted
    cuda.events.clear()
    graphs.capture(cuda.run, SECOND, pool, 1)
    assert cuda.events == [wanted[0], *wanted[3:]], "of what is warm already"
    cuda.events.clear()
    graphs.capture(cuda.run, torch.device("cuda:0"), None)
    assert ("begin", (0, 2), "cuda:0 stream 2", "thread_local") in cuda.events and ("device", "cuda:0") in cuda.events


@pytest.mark.parametrize("invalid", [False, True])
def test_a_failed_capture_leaves_nothing_behind(cuda, invalid):
    """Where the capture is invalid, torch leaves the stream current, its allocator recording and its generator held."""

    def run():
        if "clear" in cuda.events:
            cuda.fails = invalid
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error" if invalid else "not permitted"):
        graphs.capture(run, SECOND, None)
    begun = cuda.events.index("end") + 1
    # an empty capture, which ends well, brings the generator back
    assert cuda.events[begun:] == [
        ("end allocation", 1, (0, 1)), ("begin", None, "cuda:1 stream 1", "thread_local"), "end", "clear",
    ]  # fmt: skip
    assert cuda.current == "default"
    assert no_capture_is_under_way()


@pytest.mark.slow
def test_autocast_keeps_no_casts_that_a_capture_would_read(monkeypatch):
    """They are freed when the caller leaves autocast; replays would go on reading them."""
    cached = []
    monkeypatch.setattr(graphs, "capture", captures.capture)

    def prefill(given):
        cached.append((torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")))
        return given["x"] * 2

    def step(cond, scale, x, x0, noise, index):
        cached.append((torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cpu")))
        return cond + x, x0

    for enabled in (True, False):
        cached.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled):
            graphs.StepGraph(prefill, step, dict(x=torch.ones(2, 3)), (2, 3), 4)
            assert torch.is_autocast_cache_enabled()
        assert set(cached) == {(False, enabled)} and len(cached) == 8


@pytest.fixture
def drawn(cuda, monkeypatch):
    """Draws on a device that is not there: each fails within a capture, and says what was drawn."""
    found = []
    cuda.capturing = False

    def randn(*args, device=None, **kwargs):
        assert not cuda.capturing, "Offset increment outside graph capture encountered unexpectedly."
        found.append(device)
        return SimpleNamespace(to=lambda *args: None)

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "randn_like", lambda t: randn(device=t.device))
    return found


def test_draws_wait_for_captures_of_other_threads(cuda, drawn, monkeypatch):
    place = SimpleNamespace(device=torch.device("cuda:0"))
    begun, noise = threading.Event(), steps.Noise((2, 3), place.device)
    calls = (lambda: next(noise), lambda: next(steps.Noise((2, 3), place.device)), lambda: draws.randn_like(place))

    def run():
        if "clear" in cuda.events:  # no longer warming up
            cuda.capturing = True
            begun.set()
            time.sleep(0.1)
            cuda.capturing = False

    def work(number: int) -> None:
        if number < 0:
            graphs.capture(run, SECOND, None)
        else:
            assert begun.wait(60)
            calls[number]()

    at_once(work, range(-1, len(calls)))
    assert drawn == [place.device] * len(calls)


def test_which_draws_wait(monkeypatch):
    own, default = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    assert draws.drawing(SECOND) is draws.drawing(SECOND, default) is draws.capturing
    with draws.capturing, draws.drawing(SECOND):
        pass  # a thread does not wait for itself
    for place, generator in ((SECOND, own), (torch.device("cpu"), None)):
        with draws.drawing(place, generator):
            assert no_capture_is_under_way()


def unheld(tree: ast.AST, held: bool = False) -> list[int]:
    """Lines that may draw from a default generator of CUDA outside of `drawing`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        inside = held or (isinstance(node, ast.FunctionDef) and node.name == "__init__")  # weights, on the CPU
        if isinstance(node, ast.With):
            inside |= any("drawing" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords}
            anywhere = node.func.attr in DRAWS_ANYWHERE and "torch.nn.init" not in ast.unparse(node.func)
            on_device = node.func.attr in DRAWS and ast.unparse(node.func.value) == "torch" and "device" in keywords
            if not inside and (anywhere or on_device):
                found.append(node.lineno)
        found += unheld(node, inside)
    return found


def test_every_draw_of_the_package_waits():
    assert unheld(
        ast.parse("torch.randn(2, device=x)\nwith drawing(x):\n    torch.randn(2, device=x)\ny.normal_()")
    ) == [1, 4]
    files = sorted(Path(fastprior.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    assert {file.name: lines for file in files if (lines := unheld(ast.parse(file.read_text())))} == {}


def test_a_graph_keeps_the_workspace_that_it_was_captured_with(monkeypatch):
    """The step asks for more than the prefill did, whose memory is still there when it is replayed."""
    pytest.importorskip("triton")
    monkeypatch.setattr(graphs, "capture", captures.capture)
    used, like = {2: set(), 5: set()}, torch.zeros(1)

    def use(size: int) -> None:
        shared = workspace.current()
        used[size].add((shared.sums((size, 3), like).data_ptr(), shared.counters(size, like).data_ptr()))

    def prefill(given):
        use(2)
        return given["text"] + 1

    def step(cond, scale, x, x0, noise, index):
        use(5)
        return x + cond, x0 + noise

    with ops.sharing() as around:
        graph = graphs.StepGraph(prefill, step, dict(text=torch.zeros(2, 4)), (2, 4), 3)
    kept = {t.data_ptr() for t in graph._buffers}
    assert len(used[2]) == len(used[5]) == 1 and not used[2] & used[5]
    assert kept >= {address for addresses in (*used[2], *used[5]) for address in addresses}
    assert not around.tensors
    assert graph.bytes == 2000 + 4 * 8 * 4 + 12 + 4 * (6 + 15 + 2 * workspace.COUNTERS)
