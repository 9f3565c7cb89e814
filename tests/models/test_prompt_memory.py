"""The prefix of the last call is reused only where a full pass would give the same, and it outlives no run."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastprior.models import snapshot
from fastprior.models.prior_transformer import cached_blocks, prompt_memory
from fastprior.models.prior_transformer.in_diffusers import StockPrior
from fastprior.models.prior_transformer.prompt_memory import Remembered, remembered
from helpers.at_once import at_once
from helpers.priors import relative_error
from helpers.pt_cases import MAKES, TOLERANCE, make_inputs, make_stock, within_diffusers

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:::peft.tuners.tuners_utils")  # adapters come and go here

LORA = dict(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


@pytest.fixture
def prefills(monkeypatch):
    """A list that grows by one element, the number of prompts, at every prefill."""
    made, run = [], cached_blocks.prefill

    def prefill(blocks, x, *args):
        made.append(len(x))
        return run(blocks, x, *args)

    monkeypatch.setattr(cached_blocks, "prefill", prefill)
    return made


@torch.no_grad()
def full(model, given):
    """The prediction of diffusers' own forward on our model, as it is now."""
    return StockPrior.forward(model, **given)[0]


@torch.no_grad()
def run(model, given):
    return model(**given)[0]


class Scene:
    """A model with two adapters, its inputs, and what a change needs to happen in the middle of a run."""

    def __init__(self, adapters: bool):
        self.model, self.around = within_diffusers(make_stock(dropout=0.5)), contextlib.nullcontext
        if adapters:
            torch.manual_seed(0)
            for name in ("first", "second"):
                self.model.add_adapter(peft.LoraConfig(**LORA), name)
            self.model.set_adapters(["first"])
            self.model.eval()
        self.given = make_inputs(self.model.config)

    @property
    def block(self):
        return self.model.transformer_blocks[0]


def in_inference_mode(scene):
    with torch.inference_mode():
        scene.given = {name: t.clone() for name, t in scene.given.items()}
        run(scene.model, scene.given)
        scene.given["proj_embedding"].mul_(2)


def as_autocast(scene):
    scene.around = lambda: torch.autocast("cpu", torch.bfloat16)


def halved(state):
    return {name: t / 2 for name, t in state.items()}


def optimised(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    model.zero_grad()


def set_text(scene, name, value):
    scene.given[name] = value


def fewer(scene):
    scene.given = {name: t[1:3] if t.dim() else t for name, t in scene.given.items()}


def one_number(weight):
    with torch.no_grad():
        weight[3, 5] += 2


def parametrized(block):
    torch.nn.utils.parametrize.register_parametrization(block.attn1.to_k, "weight", nn.Softplus())


# the change, and the checks that see it; with these blinded the result must be stale
CHANGES = {
    "another text embedding": (lambda s: set_text(s, "proj_embedding", torch.ones(4, 20)), "conditioning"),
    "another text": (lambda s: set_text(s, "encoder_hidden_states", torch.ones(4, 7, 20)), "conditioning"),
    "another mask": (lambda s: set_text(s, "attention_mask", torch.ones(4, 7).bool()), "conditioning"),
    "a text edited in place": (lambda s: s.given["encoder_hidden_states"].mul_(2), "conditioning"),
    "a mask edited in place": (lambda s: s.given["attention_mask"].fill_(True), "conditioning"),
    "a text edited through .data": (lambda s: s.given["proj_embedding"].data.mul_(2), "conditioning"),
    "a text edited in inference mode": (in_inference_mode, "conditioning"),
    "other rows, fewer": (fewer, "conditioning"),
    "a weight edited in place": (lambda s: one_number(s.block.attn1.to_k.weight), "weights"),
    "a position edited in place": (lambda s: one_number(s.model.positional_embedding[0]), "weights"),
    "a weight replaced": (
        lambda s: setattr(s.block.attn1.to_v, "weight", nn.Parameter(torch.ones(32, 32))),
        "weights modules values",
    ),
    "a weight's memory replaced": (lambda s: setattr(s.block.attn1.to_v.weight, "data", torch.ones(32, 32)), "weights"),
    "weights loaded": (lambda s: s.model.load_state_dict(halved(s.model.state_dict())), "weights values"),
    "weights assigned": (
        lambda s: s.model.load_state_dict(halved(s.model.state_dict()), assign=True),
        "weights modules values",
    ),
    "an optimizer's step": (lambda s: optimised(s.model), "weights values"),
    "a weight edited through .data": (lambda s: s.block.attn1.to_k.weight.data.mul_(2), "values"),
    "a sign changed through .data": (lambda s: s.block.attn1.to_k.weight.data.neg_(), "values"),
    "a norm's epsilon": (lambda s: setattr(s.block.norm1, "eps", 3.0), "modules"),
    "a module replaced": (lambda s: setattr(s.block.attn1, "to_v", nn.Linear(32, 32)), "modules"),
    "a module that was unknown": (
        lambda s: setattr(s.block.attn1, "to_v", nn.Sequential(nn.Linear(32, 32))),
        "modules",
    ),
    "a processor replaced": (lambda s: s.model.set_attn_processor(Nothing()), "modules"),
    "a hook": (lambda s: s.block.norm1.register_forward_hook(lambda module, given, out: 2 * out), "modules"),
    "a hook in front": (
        lambda s: s.block.ff.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
        "modules",
    ),
    "a forward replaced": (lambda s: setattr(s.block.attn1.to_q, "forward", lambda x: x), "modules"),
    "a weight parametrized": (lambda s: parametrized(s.block), "modules weights"),
    "an adapter added": (lambda s: s.model.add_adapter(peft.LoraConfig(**LORA)), "modules"),
    "an adapter switched": (lambda s: s.model.set_adapters(["second"]), "modules"),
    "two adapters": (lambda s: s.model.set_adapters(["first", "second"], [0.3, 0.7]), "modules"),
    "adapters off": (lambda s: s.model.disable_lora(), "modules"),
    "an adapter's weight": (lambda s: s.model.set_adapters(["first"], 0.3), "modules"),
    "an adapter merged": (lambda s: s.model.fuse_lora(lora_scale=0.3), "weights modules values"),
    "an adapter deleted": (lambda s: s.model.delete_adapters("first"), "modules"),
    "autocast": (as_autocast, "key"),
}
CHECKS = {
    "conditioning": (Remembered, "same_text"),
    "key": (Remembered, "same_key"),
    "weights": (snapshot.Snapshot, "same_weights"),
    "modules": (snapshot.Snapshot, "same_modules"),
    "values": (snapshot.Snapshot, "same_values"),
}


class Nothing:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return torch.zeros_like(hidden_states)


@pytest.mark.parametrize("blind", [False, True], ids=["seen", "blind"])
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name, blind, monkeypatch):
    scene = Scene(adapters="adapter" in name and "added" not in name)
    change, checks = CHANGES[name]
    run(scene.model, scene.given)
    entry = remembered(scene.model)
    assert entry is not None
    text = scene.given["proj_embedding"]  # held, so that the prefix does not go with it
    change(scene)
    if blind:
        for check, (owner, method) in CHECKS.items():
            if check in checks.split():
                monkeypatch.setattr(owner, method, lambda *args: True)
        if name == "other rows, fewer":
            with pytest.raises(ValueError, match="rows"):
                run(scene.model, scene.given)
            return
    with scene.around():
        got, wanted = run(scene.model, scene.given), full(scene.model, scene.given)
    assert got.dtype == wanted.dtype and text is not None
    assert (remembered(scene.model) is entry) == blind
    if name != "autocast":
        assert (relative_error(got, wanted) > TOLERANCE) == blind, "stale with the check blinded, and only then"
    elif not blind:
        assert relative_error(got, wanted) < 0.02


def test_what_stays_the_same_is_not_run_again(prefills):
    model = within_diffusers(make_stock())
    given = make_inputs(model.config)
    for time in range(5):
        given = given | dict(timestep=time, hidden_states=torch.randn(4, 20))
        assert relative_error(run(model, given), full(model, given)) < TOLERANCE
    assert prefills == [4]
    for _ in range(2):  # equal text in other memory is the same text
        given = given | dict(encoder_hidden_states=given["encoder_hidden_states"].clone())
        assert relative_error(run(model, given), full(model, given)) < TOLERANCE
    model.eval().requires_grad_(False)
    run(model, given)
    assert prefills == [4]


def test_equal_rows_run_once(prefills):
    model = within_diffusers(make_stock())
    given = make_inputs(model.config, rows=8)
    for name in ("proj_embedding", "encoder_hidden_states", "attention_mask"):
        given[name][:4] = given[name][:1].clone()  # as the empty negative prompt of guidance
    assert relative_error(run(model, given), full(model, given)) < TOLERANCE
    assert prefills == [5]


@pytest.mark.parametrize("make", MAKES)
def test_adapters_keep_the_prefix(make, prefills):
    model, given = MAKES[make](make_stock()), make_inputs(make_stock().config)
    before = run(model, given)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model)
    model.eval()
    prefills.clear()
    for _ in range(3):
        got = run(model, given)
    assert prefills == [4] and relative_error(got, before) > 0.01
    with torch.enable_grad():
        assert relative_error(got, model(**given)[0].detach()) < TOLERANCE


@pytest.mark.filterwarnings("ignore")  # of tracing, and of slow operations under vmap
@pytest.mark.parametrize(
    "mode", ["grad", "no mask", "dropout", "vmap", "trace", "make_fx", "capture", "meta", "fake", "functional_call"]
)
def test_calls_that_reuse_nothing(mode, prefills, monkeypatch):
    model = within_diffusers(make_stock(dropout=0.1))
    given = make_inputs(model.config)
    if mode == "grad":
        assert model(**given)[0].requires_grad
    elif mode == "no mask":
        given["attention_mask"] = None
        assert relative_error(run(model, given), full(model, given)) < TOLERANCE
    elif mode == "dropout":
        model.train()
        torch.manual_seed(0)
        got = run(model, given)
        torch.manual_seed(0)
        assert relative_error(got, full(model, given)) < TOLERANCE < relative_error(got, run(model, given))
    elif mode == "capture":  # of a CUDA graph, which comparing tensors would break
        for name in ("is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        assert relative_error(run(model, given), full(model, given)) < TOLERANCE
    elif mode == "meta":
        assert run(model.to("meta"), {name: t.to("meta") for name, t in given.items()}).shape == (4, 20)
    elif mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            assert run(model, {name: fakes.from_tensor(t) for name, t in given.items()}).shape == (4, 20)
    elif mode == "vmap":
        many = torch.randn(3, 4, 20)
        with torch.no_grad():
            got = torch.func.vmap(lambda x: model(**given | dict(hidden_states=x))[0])(many)
        assert relative_error(got[1], full(model, given | dict(hidden_states=many[1]))) < TOLERANCE
    elif mode in ("trace", "make_fx"):
        model.requires_grad_(False)
        with torch.no_grad():
            call = lambda text: model(**given | dict(proj_embedding=text), return_dict=False)  # noqa: E731
            if mode == "trace":
                traced = torch.jit.trace(call, given["proj_embedding"], check_trace=False)  # which calls it untraced
            else:
                traced = make_fx(call)(given["proj_embedding"])
        other = given | dict(proj_embedding=torch.ones(4, 20))
        assert relative_error(traced(torch.ones(4, 20))[0], full(model, other)) < TOLERANCE
    else:
        run(model, given)
        weights = {name: t.detach() / 2 for name, t in model.named_parameters()}
        with torch.no_grad():
            got = torch.func.functional_call(model, weights, kwargs=given)[0]
        model.load_state_dict(weights)
        assert relative_error(got, full(model, given)) < TOLERANCE
        assert len(prefills) == 2
        return
    assert prefills == []


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_compiled(grad, prefills):
    model = within_diffusers(make_stock())
    given = make_inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for text in (given["proj_embedding"], torch.ones(4, 20)):
            other = given | dict(proj_embedding=text)
            assert relative_error(compiled(**other)[0].detach(), full(model, other)) < TOLERANCE
    assert prefills == []


def test_inference_mode_and_back(prefills):
    model = within_diffusers(make_stock())
    with torch.inference_mode():
        given = make_inputs(model.config)
        first = model(**given)[0]
    assert torch.equal(run(model, given), first)
    with torch.inference_mode():
        assert torch.equal(model(**given)[0], first)
    assert prefills == [4] and relative_error(first, full(model, given)) < TOLERANCE


def test_threads_keep_their_own(prefills):
    model = within_diffusers(make_stock())
    givens = [make_inputs(model.config, seed=seed) for seed in range(4)]
    wanted, wrong = [full(model, given) for given in givens], []
    barrier = threading.Barrier(4, timeout=60)  # where one fails the others do not wait for ever

    def work(index):
        for _ in range(20):
            barrier.wait()
            if not relative_error(run(model, givens[index]), wanted[index]) < TOLERANCE:
                wrong.append(index)

    at_once(work, range(4))
    assert not wrong and len(prefills) == 4


# nothing is left behind


def prefix_memory(model) -> weakref.ref:
    return weakref.ref(remembered(model).prefix.k)


def dropped_conditioning(model, given):
    held = given["proj_embedding"]
    del given["encoder_hidden_states"], given["attention_mask"]
    assert remembered(model) is not None, "the caller still holds a part"
    del given["proj_embedding"], held


def failed_call(model, given):
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        run(model, given)


ENDS = {
    "the conditioning is gone": dropped_conditioning,
    "another conditioning": lambda model, given: run(model, given | dict(proj_embedding=torch.ones(4, 20))),
    "moved": lambda model, given: model.to(torch.float64),
    "a call that fails": failed_call,
    "forgotten": lambda model, given: prompt_memory.forget(model),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_prefix_ends(end):
    model = within_diffusers(make_stock())
    given = make_inputs(model.config)
    run(model, given)
    memory = prefix_memory(model)
    assert memory() is not None
    gc.disable()  # by counting references alone: a device's memory must not wait for the collector
    try:
        ENDS[end](model, given)
        assert memory() is None
    finally:
        gc.enable()


def test_model_goes_while_the_conditioning_stays():
    gc.disable()
    try:
        model = within_diffusers(make_stock())
        given = make_inputs(model.config)
        run(model, given)
        memory, alive, weight = prefix_memory(model), weakref.ref(model), weakref.ref(model.proj_in.weight)
        del model
        assert alive() is None and memory() is None and weight() is None
    finally:
        gc.enable()


def test_thread_goes_while_the_conditioning_stays():
    model = within_diffusers(make_stock())
    given, memories = make_inputs(model.config), []

    def work():
        run(model, given)
        memories.append(prefix_memory(model))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert memories[0]() is None


def test_conditioning_may_go_in_another_thread():
    model = within_diffusers(make_stock())
    given = make_inputs(model.config)
    run(model, given)
    memory, held = prefix_memory(model), [given]
    del given
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert memory() is None and remembered(model) is None


def test_the_callers_tensors_are_not_kept_or_changed():
    model = within_diffusers(make_stock())
    given = make_inputs(model.config)
    saved, refs = copy.deepcopy(given), {name: weakref.ref(t) for name, t in given.items()}
    run(model, given)
    assert all(torch.equal(given[name], saved[name]) for name in given)
    given.clear()
    assert not [name for name, ref in refs.items() if ref() is not None]
