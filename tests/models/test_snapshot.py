"""What is made of a model is kept from run to run, and made anew after whatever it depends on has changed."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.prior_transformer import prompt_memory
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text
from helpers.storm import DIM, LENGTH, make_transformer


@pytest.fixture
def made(monkeypatch):
    """How often blocks were prepared."""
    calls, prepare = [], ops.prepare_blocks
    monkeypatch.setattr(ops, "prepare_blocks", lambda *args, **kwargs: calls.append(1) or prepare(*args, **kwargs))
    return calls


def run(prior, scale=1.0):
    draw = torch.Generator().manual_seed(0)
    return prior.p_sample_loop((2, DIM), make_text(2, DIM), scale, timesteps=3, generator=draw, progress=False)


def pipeline_run(pipeline):
    text = *make_text(2, DIM, LENGTH).values(), torch.ones(2, LENGTH, dtype=torch.bool)
    options = dict(num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    return pipeline(TextEncoding(*text), **options).image_embeds


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _attn(prior):
    return prior.net.causal_transformer.layers[0][0]


def _replaced_module(prior, _):
    attn = _attn(prior)
    old, attn.to_q = attn.to_q, Doubled(DIM, attn.to_q.out_features, bias=False)
    attn.to_q.weight = old.weight


def _element(prior, _):
    """Not among the numbers that a snapshot looks at."""
    prior.net.causal_transformer.layers[0][1][1].weight.data[0, 0] += 3


def _transposed(prior, _):
    weight = prior.net.causal_transformer.project_out.weight
    weight.data = weight.data.t()


CHANGES = {
    "loaded": lambda prior, _: prior.load_state_dict(make_prior(seed=1).state_dict()),
    "assigned": lambda prior, _: prior.net.load_state_dict(make_prior(seed=1).net.state_dict(), assign=True),
    "one element": _element,
    "transposed": _transposed,
    "module": _replaced_module,
    "hook": lambda prior, _: _attn(prior).to_q.register_forward_hook(lambda module, given, out: out * 2),
    "hook of attention": lambda prior, _: _attn(prior).register_forward_hook(lambda module, given, out: out * 2),
    "scale": lambda prior, _: [setattr(attn, "scale", 3.0) for attn, _ in prior.net.causal_transformer.layers],
    "patch": lambda prior, monkeypatch: monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: 2 * (x @ w.t()) + (0 if b is None else b)
    ),
    "no change": lambda prior, _: None,
}


# a null table does not see an element that no snapshot looks at
CASES = [(change, scale) for change in CHANGES for scale in (1.0, 2.0) if (change, scale) != ("one element", 2.0)]


@pytest.mark.parametrize("change, scale", CASES)
def test_changes_are_seen(change, scale, monkeypatch):
    prior, twice = make_prior(), make_prior()
    serve = partial(run, scale=scale)
    before = [serve(prior) for _ in range(3)]
    assert torch.equal(before[0], before[2])
    for one in (prior, twice):
        CHANGES[change](one, monkeypatch)
    got, wanted = serve(prior), serve(twice)  # which ran for the first time
    assert torch.equal(got, wanted) and torch.equal(got, before[0]) == (change == "no change")


def test_runs_of_one_state_prepare_blocks_once(made):
    prior = make_prior()
    for _ in range(3):
        run(prior)
    assert len(made) == 1
    with torch.no_grad():
        prior.net.learned_query.add_(1)
    for _ in range(2):
        run(prior, 2.0)
    assert len(made) <= 3  # one of them of the null table's


@pytest.mark.parametrize("options", [{}, dict(dtype=torch.bfloat16), dict(quantise="int8")], ids=str)
def test_calls_of_samplers_prepare_no_blocks(made, options):
    sampler = PriorSampler(make_prior(), timesteps=3, batch_sizes=(2,), compile=False, **options)
    call = lambda: sampler(**make_text(2, DIM), generator=torch.Generator().manual_seed(0))  # noqa: E731
    wanted = call()
    made.clear()
    assert torch.equal(call(), wanted) and not made


def test_calls_of_pipelines_look_once(made, monkeypatch):
    looks, look = [], prompt_memory.prefix_obstacles
    each = prompt_memory._each_obstacle
    monkeypatch.setattr(prompt_memory, "_each_obstacle", lambda *args: looks.append(1) or each(*args))
    pipeline = PriorPipeline(make_transformer(0), DiffusersSchedule("UnCLIPScheduler"))
    wanted = pipeline_run(pipeline)
    assert len(looks) == 1 and len(made) == 1
    assert torch.equal(pipeline_run(pipeline), wanted) and len(looks) == 1 and len(made) == 1
    pipeline.prior.transformer_blocks[0].attn1.register_forward_hook(lambda *_: None)
    assert any("hook" in reason for reason in look(pipeline.prior, 3))
    with pytest.warns(UserWarning, match="has a hook"):
        pipeline_run(pipeline)


def test_gradients_are_of_the_model():
    """Whose twin runs without."""
    grads = []
    for prior in (make_prior(), make_prior()):
        if grads:
            run(prior)
        net, text = prior.net, make_text(2, DIM)
        cond = net.prefill(**text, times=torch.tensor([3]))
        net.step(torch.ones(2, DIM), torch.tensor(0), cond).square().sum().backward()
        grads.append(net.causal_transformer.project_out.weight.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_attributes_of_the_model_are_seen():
    prior, other = make_prior(), make_prior()
    run(prior)
    for one in (prior, other):
        one.net.max_text_len = 3
        one.net.null_text_encodings = nn.Parameter(one.net.null_text_encodings[:, :3].detach())
    assert torch.equal(run(prior), run(other))


def test_the_reference_is_not_kept_from():
    prior = make_prior()
    got = run(prior)
    with ops.using("reference"):
        wanted = run(prior)
    assert not torch.equal(got, wanted) and torch.allclose(got, wanted, atol=1e-4)


def test_nothing_is_kept_under_a_mode():
    net = make_prior().net
    with TorchDispatchMode(), snapshot.running(net):
        assert snapshot.once(net.causal_transformer, "key", lambda: [1]) is not None
        assert snapshot.once(net.causal_transformer, "key", lambda: None) is None


@pytest.mark.parametrize("hook", [False, True])
def test_no_model_is_kept_alive(hook):
    prior = make_prior()
    if hook:
        _attn(prior).to_q.register_forward_hook(lambda *_, prior=prior: None)
    run(prior)
    gone, net = weakref.ref(prior), weakref.ref(prior.net)
    del prior
    gc.collect()
    assert gone() is None and net() is None


def test_weights_that_moved_are_let_go():
    prior = make_prior()
    run(prior)
    twin = snapshot.twin_of(prior.net)
    alias, weight = (net.causal_transformer.project_out.weight for net in (twin, prior.net))
    assert alias is not weight and alias.data_ptr() == weight.data_ptr()
    gone = weakref.ref(alias)
    del twin, alias
    gc.collect()
    assert gone() is not None  # kept for the next run
    prior.to(torch.float64)
    gc.collect()
    assert gone() is None


def test_training_mode_comes_back():
    prior, text = make_prior(), make_text(2, DIM)
    options = dict(timesteps=3, progress=False)
    wanted = prior.sample(**text, **options, generator=torch.Generator().manual_seed(0))
    for model in (prior.train(), copy.deepcopy(prior).train()):
        got = model.sample(**text, **options, generator=torch.Generator().manual_seed(0))
        assert torch.equal(got, wanted) and model.training and _attn(model).training
    prior.eval()
    prior.net.causal_transformer.train()  # a part alone
    got = prior.sample(**text, **options, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, wanted) and not _attn(prior).training


def test_runs_within_runs():
    prior, other = make_prior(), make_prior(seed=1)
    run(prior)
    with snapshot.running(prior.net):
        state = snapshot.state(prior.net)
        inner = run(other)
        assert snapshot.state(prior.net) is state
        snapshot.forget(prior.net)
        assert snapshot.state(prior.net) is not state
    assert torch.equal(inner, run(make_prior(seed=1)))
