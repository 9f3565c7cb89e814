"""Many runs of one sampler from two threads, with other weights now and then: each is what a fresh sampler gives."""

import contextlib
import copy
import gc
import itertools
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import torch

from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import make_prior, make_text

PHASES = 12  # between changes of the weights
CASES = 8  # different ones, of each phase
BATCH_SIZES = 1, 2, 4
OPTIONS = dict(batch_sizes=BATCH_SIZES, timesteps=5, compile=False)


def _load(prior, number: int) -> None:
    prior.load_state_dict(make_prior(dict(dim=prior.net.dim), seed=number).state_dict())


def _move(prior, number: int) -> None:
    """To other addresses, with the same values."""
    prior.to(torch.float64).to(torch.float32)


@torch.no_grad()
def _merge_lora(prior, number: int) -> None:
    attn, feed_forward = prior.net.causal_transformer.layers[0]
    for weight in (attn.to_q.weight, feed_forward[1].weight):
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        weight.addmm_(up.to(weight), down.to(weight), alpha=0.1)


def live_bytes(device: str = "cpu") -> int:
    """Of all tensors that anything refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # made at first use, kept for each stream
        return torch.cuda.memory_allocated()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [t for t in tensors if t.layout is torch.strided]  # other tests may have left another kind
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def soak(prior, sampler: PriorSampler, runs: int) -> None:
    """Raises AssertionError for a result that differs in one bit, or memory that grows after the first changes."""
    device = prior.device.type
    choose, text = random.Random(0), {name: t.to(device) for name, t in make_text(9, prior.net.dim).items()}

    def run(which, case):
        rows, length, scale, seed = case
        given = dict(text_embed=text["text_embed"][rows], text_encodings=text["text_encodings"][rows, :length])
        return which(**given, cond_scale=scale, generator=torch.Generator(device).manual_seed(seed))

    def wrong(cases, wanted, numbers, stream):
        with stream:
            return [cases[at] for at in numbers if not torch.equal(run(sampler, cases[at]), wanted[at])]

    levels = []
    changes = itertools.cycle((_load, _move, _merge_lora))
    streams = [
        torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext() for _ in range(2)
    ]
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            for phase in range(PHASES):
                next(changes)(prior, phase + 1)
                cases = []
                for number in range(CASES):
                    prompts = 1 + number % 6  # all batch sizes, and two parts
                    first = choose.randrange(10 - prompts)
                    rows, length = slice(first, first + prompts), choose.randint(0, 5)
                    cases.append((rows, length, choose.choice((1.0, 1.7, 4.0)), choose.randrange(99)))
                alone = PriorSampler(copy.deepcopy(prior), graphs=False, **OPTIONS)
                wanted = [run(alone, case) for case in cases]
                del alone
                numbers = [choose.randrange(CASES) for _ in range(runs // PHASES)]
                shares = numbers[::2], numbers[1::2]
                found = list(pool.map(wrong, [cases] * 2, [wanted] * 2, shares, streams))
                assert found == [[], []], found
                levels.append((live_bytes(device), tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    (tensors, objects), (last_tensors, last_objects) = levels[2], levels[-1]
    assert last_tensors - tensors < 2**16 and last_objects - objects < 2**17, levels
