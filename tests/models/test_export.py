"""Programs that torch.export, torch.jit.trace and ONNX make of networks, for other runtimes and any batch."""

import pytest
import torch
from torch import nn

import fastprior
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from helpers.priors import NETWORK, make_prior, make_text, relative_error
from helpers.pt_cases import MAKES, TOLERANCE, make_inputs, make_stock

pytest.importorskip("diffusers")

EXAMPLE_ROWS, OTHER_ROWS = 4, (7, 1)  # a batch that a program is made for, and batches that it runs


class OfText(nn.Module):
    """A network of DALLE2-pytorch's kind by positional arguments, as exporters name inputs."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, times, text_embed, text_encodings=None, self_cond=None):
        return self.net(x, times, text_embed=text_embed, text_encodings=text_encodings, self_cond=self_cond)

    def inputs(self, rows: int, seed: int) -> tuple:
        draw, text = torch.Generator().manual_seed(seed), make_text(rows, self.net.dim, length=7, seed=seed)
        x, self_cond = torch.randn(2, rows, self.net.dim, generator=draw)
        given = x, (torch.arange(rows) * 3 + seed) % 20, text["text_embed"]
        return given + (text["text_encodings"], self_cond) if self.net.self_cond else given


class WithEncodings(OfText):
    def inputs(self, rows: int, seed: int) -> tuple:
        encodings = make_text(rows, self.net.dim, length=7, seed=seed + 50)["text_encodings"]
        encodings[:, 0] = 1  # a PriorTransformerNet has no empty texts
        return *super().inputs(rows, seed)[:3], encodings


class OfTensors(nn.Module):
    """A PriorTransformer by positional arguments; a timestep for all rows or for each."""

    def __init__(self, prior: nn.Module, times: bool = False):
        super().__init__()
        self.prior, self.times = prior, times

    def forward(self, hidden_states, timestep, proj_embedding, encoder_hidden_states, attention_mask):
        text = proj_embedding, encoder_hidden_states, attention_mask
        return self.prior(hidden_states, timestep, *text, return_dict=False)[0]

    def inputs(self, rows: int, seed: int) -> tuple:
        given = make_inputs(self.prior.config, rows, seed=seed)
        given["timestep"] = torch.arange(rows) * 7 + seed if self.times else torch.tensor(13 + seed)
        return tuple(given.values())


def small(**net) -> nn.Module:
    return make_prior(NETWORK | dict(depth=1) | net).net


CASES = {
    "dalle2": lambda: WithEncodings(small()),
    "dalle2, no encodings": lambda: OfText(small()),
    "dalle2, self_cond": lambda: OfText(small(self_cond=True, normformer=True)),
    "prior transformer": lambda: OfTensors(MAKES["without"](make_stock(num_layers=1))),
    "prior transformer, times": lambda: OfTensors(MAKES["without"](make_stock(num_layers=1)), times=True),
    "accelerated": lambda: OfTensors(MAKES["within"](make_stock(num_layers=1))),
    "as network": lambda: WithEncodings(PriorTransformerNet(MAKES["without"](make_stock(num_layers=1)))),
}
QUICK = "dalle2", "accelerated"
FAMILIES = pytest.mark.parametrize("case", QUICK)
ALL = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)


def warm(case: str) -> nn.Module:
    """A module that has run: what it remembers of a text, and kernels that know where weights lie."""
    module = CASES[case]().eval()
    with torch.no_grad():
        for _ in range(2):
            module(*module.inputs(EXAMPLE_ROWS, seed=0))
    return module


def assert_same(program, module, rows=OTHER_ROWS):
    with torch.no_grad():
        for batch in (EXAMPLE_ROWS, *rows):
            given = module.inputs(batch, seed=batch)
            assert relative_error(program(*given).detach(), module(*given)) < TOLERANCE, batch


def batch_of(given: tuple, dim) -> tuple:
    return tuple({0: dim} if t.ndim else None for t in given)


def exported(module: nn.Module, dim=None, **options) -> torch.export.ExportedProgram:
    given = module.inputs(EXAMPLE_ROWS, seed=0)
    return torch.export.export(module, given, dynamic_shapes=dim and batch_of(given, dim), **options)


@ALL
def test_exported_for_any_batch(case):
    module = warm(case)
    with torch.no_grad():  # where kernels would be taken
        program = exported(module, torch.export.Dim("batch"))
    assert not [node for node in program.graph.nodes if "fastprior" in str(node.target)], "kernels are ours alone"
    assert_same(program.module(), module)


@FAMILIES
def test_exported_for_one_batch(case):
    module = warm(case)
    program = exported(module)  # with gradients
    assert_same(program.module(), module, rows=())
    with pytest.raises((AssertionError, RuntimeError), match="4"):  # of whichever torch says so
        program.module()(*module.inputs(EXAMPLE_ROWS + 1, seed=0))


@pytest.mark.filterwarnings("ignore")  # of tracing: checks of shapes are no part of the program
@ALL
def test_traced(case):
    module = warm(case)
    with torch.no_grad():
        program = torch.jit.trace(module, module.inputs(EXAMPLE_ROWS, seed=0), check_trace=True)
    assert_same(program, module)


@pytest.mark.slow
def test_several_rows_of_a_prompt_are_exported():
    module, samples, batch = warm("dalle2"), 3, torch.export.Dim("batch")

    def inputs(rows):
        x, times, *text = module.inputs(rows, seed=rows)
        return x.repeat_interleave(samples, dim=0) + torch.arange(rows * samples)[:, None], times.repeat(samples), *text

    dims = samples * batch, samples * batch, batch, batch
    with torch.no_grad():
        program = torch.export.export(module, inputs(4), dynamic_shapes=tuple({0: dim} for dim in dims)).module()
        for rows in (4, 7):
            assert relative_error(program(*inputs(rows)), module(*inputs(rows))) < TOLERANCE


@pytest.mark.slow
@FAMILIES
def test_exported_strictly(case):
    module = warm(case)
    assert_same(exported(module, torch.export.Dim("batch"), strict=True).module(), module)


def onnx_program(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, inputs)})[0])


@pytest.mark.slow
@ALL
def test_onnx(case, tmp_path):
    pytest.importorskip("onnxscript")
    module, path = warm(case), str(tmp_path / "network.onnx")
    given = module.inputs(EXAMPLE_ROWS, seed=0)
    dims = batch_of(given, torch.export.Dim("batch"))
    torch.onnx.export(module, given, path, dynamo=True, verbose=False, dynamic_shapes=dims)
    assert_same(onnx_program(path), module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tracing
@FAMILIES
def test_onnx_of_a_trace(case, tmp_path):
    """By the older exporter, for one batch."""
    pytest.importorskip("onnx")
    module, path = warm(case), str(tmp_path / "network.onnx")
    torch.onnx.export(module, module.inputs(EXAMPLE_ROWS, seed=0), path, dynamo=False)
    assert_same(onnx_program(path), module, rows=())


@pytest.mark.slow
@FAMILIES
def test_compiled_ahead_of_time(case, tmp_path):
    module = warm(case)
    with torch.no_grad():
        program = exported(module, torch.export.Dim("batch", min=2, max=64))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    assert_same(torch._inductor.aoti_load_package(path), module, rows=(7,))


@pytest.mark.slow
@ALL
def test_compiled_whole(case):
    """By torch.compile, which keeps kernels."""
    torch._dynamo.reset()  # it counts how often the same code was compiled, for other modules too
    module = warm(case)
    assert_same(torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager"), module)
    assert fastprior.kernels.ops.forced() is None
