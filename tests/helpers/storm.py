"""Calls of many threads while others change the weights: each answer must be that of one set of weights, to the bit."""

import copy
import faulthandler
import pickle
import random
import sys
import threading
import time
from dataclasses import dataclass, field

import torch

import fastprior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.models import snapshot
from fastprior.models.prior_transformer import prompt_memory
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.prior import graphs
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import WordClip, make_prior, make_text

THREADS, SEEDS, SETS, STEPS = 8, 4, 2, 4
DIM, LENGTH = 32, 7


def make_transformer(seed: int) -> PriorTransformer:
    config = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=LENGTH)
    model, draw = PriorTransformer(**config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return model


class Models:
    """A prior and a transformer, and what serves them."""

    def __init__(self, number: int):
        torch.manual_seed(0)
        clip = WordClip()  # the same for all: it is not swapped
        self.prior = make_prior(dict(dim=DIM, max_text_len=LENGTH), seed=number, clip=clip)
        options = dict(batch_sizes=(1, 2), timesteps=STEPS, compile=False)
        self.samplers = {
            "fp32": PriorSampler(self.prior, samples_per_prompt=2, **options),
            "bf16": PriorSampler(self.prior, dtype=torch.bfloat16, **options),
            "int8": PriorSampler(self.prior, quantise="int8", **options),
        }
        self.transformer = make_transformer(number)
        self.pipeline = PriorPipeline(self.transformer, DiffusersSchedule("UnCLIPScheduler"))
        text, draw = make_text(2, DIM, LENGTH), torch.Generator().manual_seed(9)
        self.text = text
        self.mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [3]])
        self.encoding = TextEncoding(text["text_embed"], torch.randn(2, LENGTH, DIM, generator=draw), self.mask)
        self.null = TextEncoding(*(t[:1] for t in self.encoding))

    def calls(self) -> dict:
        """Everything that is called, by name: a function of the seed."""
        prior, draw = self.prior, lambda seed: torch.Generator().manual_seed(seed)

        def loop(seed):
            x = torch.randn(2, DIM, generator=draw(seed))
            with torch.no_grad(), fastprior.weights_locked(self.transformer, shared=True):
                for time_step in (700, 300, 10):
                    x = self.transformer(x, time_step, *self.encoding).predicted_image_embedding
            return x

        def run(seed, **options):
            where = (4, DIM), self.text
            return prior.p_sample_loop(*where, generator=draw(seed), progress=False, timesteps=STEPS, **options)

        def pipeline(seed):
            options = dict(num_inference_steps=STEPS, guidance_scale=2.0)
            return self.pipeline(self.encoding, self.null, generator=draw(seed), **options).image_embeds

        return {
            **{name: lambda seed, s=s: s(**self.text, generator=draw(seed)) for name, s in self.samplers.items()},
            "guided": lambda seed: self.samplers["fp32"](**self.text, cond_scale=1.5, generator=draw(seed)),
            "sample": lambda seed: prior.sample("red fox", timesteps=STEPS, generator=draw(seed), progress=False),
            "p_sample_loop": lambda seed: run(seed, cond_scale=2.5),
            "dpm++": lambda seed: run(seed, solver="dpm++"),
            "loop": loop,
            "pipeline": pipeline,
            "embed": lambda seed: prior.text_condition(["fox", "cat"][seed % 2], None, None)["text_embed"],
        }


@dataclass
class Storm:
    """What happened.

    Attributes:
        calls: of all threads.
        wrong: names and seeds of answers that are of no set of weights.
        changes: how often each kind of change was made.
        errors: that were raised.
        seconds: of all of it.
    """

    calls: int = 0
    wrong: list = field(default_factory=list)
    changes: dict = field(default_factory=dict)
    errors: list = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        changes = ", ".join(f"{count} {name}" for name, count in sorted(self.changes.items()))
        return f"{self.calls} calls, {len(self.wrong)} wrong, {self.seconds:.0f} s; {changes}"


class Changes:
    """What is done to the models while others call; one at a time, as they would undo each other."""

    def __init__(self, models: Models, wanted: dict, seed: int):
        self.models, self.wanted, self.choose = models, wanted, random.Random(seed)
        others = [models, *(Models(number) for number in range(1, SETS))]
        self.states = [copy.deepcopy(one.prior.state_dict()) for one in others]
        self.networks = [copy.deepcopy(one.prior.net.state_dict()) for one in others]
        self.transformers = [copy.deepcopy(one.transformer.state_dict()) for one in others]

    def update_sampler(self) -> None:
        sampler, state = self.choose.choice([*self.models.samplers.values()]), self.choose.choice(self.states)
        sampler.update(self.choose.choice((state, self.networks[self.choose.randrange(SETS)])))

    def update_pipeline(self) -> None:
        self.models.pipeline.update(self.choose.choice(self.transformers))

    def load(self) -> None:
        self.models.prior.load_state_dict(self.choose.choice(self.states))
        self.models.transformer.load_state_dict(self.choose.choice(self.transformers))

    def load_network(self) -> None:
        self.models.prior.net.load_state_dict(self.choose.choice(self.networks), assign=self.choose.random() < 0.3)

    def write(self) -> None:
        net, state = self.models.prior.net, self.choose.choice(self.networks)
        with fastprior.weights_locked(net):
            for name, weight in net.named_parameters():
                weight.data.copy_(state[name])

    def move(self) -> None:
        """There and back, and to where it is; without the CLIP, whose calls wait for nobody."""
        self.models.prior.to("cpu")
        for model in (self.models.prior.net, self.models.transformer):
            model.to("cpu")
            with fastprior.weights_locked(model):
                model.to(torch.float64).to(torch.float32)

    def replace(self) -> None:
        """By equal values elsewhere, in the middle of calls; not a CLIP's, which PyTorch alone reads."""
        for model in (self.models.prior.net, self.models.transformer):
            for weight in model.parameters():
                weight.data = weight.data.clone()

    def copy(self) -> None:
        """A copy is of one set of weights, too."""
        prior, seed = self.models.prior, self.choose.randrange(SEEDS)
        with fastprior.weights_locked(prior, shared=True):
            sampler = self.models.samplers["fp32"]
            other = copy.deepcopy(sampler) if seed % 2 else pickle.loads(pickle.dumps(sampler))
        got = other(**self.models.text, generator=torch.Generator().manual_seed(seed))
        assert any(torch.equal(got, one) for one in self.wanted["fp32", seed]), "a copy mixes weights"

    def forget(self) -> None:
        prompt_memory.forget(self.models.transformer)
        snapshot.forget(self.models.prior.net)
        graphs.forget(self.models.prior)

    def look(self) -> None:
        for sampler in self.models.samplers.values():
            sampler.stats()
        self.models.pipeline.stats()

    def warm_up(self) -> None:
        self.models.samplers["fp32"].warmup()

    def threads(self) -> None:
        torch.set_num_threads(self.choose.choice((1, 2)))

    KINDS = (
        *("update_sampler", "update_pipeline", "load", "load_network", "write", "move", "replace", "replace"),
        *("copy", "forget", "look", "warm_up", "threads"),
    )

    def one(self) -> str:
        name = self.choose.choice(self.KINDS)
        getattr(self, name)()
        return name


def answers() -> dict:
    """{(name, seed): what each set of weights answers, and then what it answers on 1 and on 2 threads}.

    C gives the same bits on any number, PyTorch does not: a prefill of a PriorTransformer differs by a rounding.
    """
    found, count = {}, torch.get_num_threads()
    for threads in (count, *{1, 2} - {count}):
        torch.set_num_threads(threads)
        for number in range(SETS):
            for name, call in Models(number).calls().items():
                for seed in range(SEEDS):
                    found.setdefault((name, seed), []).append(call(seed).clone())
    torch.set_num_threads(count)
    return found


def storm(calls: int, seconds: float, seed: int = 0, patience: float = 120.0, wanted: dict | None = None) -> Storm:
    """Call from several threads, until there were so many calls or the time is over.

    `wanted` is what `answers` gives. Raises AssertionError where a thread waits for longer than `patience`, after all
    stacks were written to stderr.
    """
    torch.manual_seed(0)
    wanted, models, done, began = wanted or answers(), Models(0), Storm(), time.monotonic()
    changes, over, counting = Changes(models, wanted, seed), threading.Event(), threading.Lock()
    all_calls = list(models.calls().items())
    beats = [time.monotonic()] * (THREADS + 2)

    def guarded(number, work):
        choose = random.Random(seed * 1000 + number)
        try:
            while not over.is_set():
                beats[number] = time.monotonic()
                work(choose)
        except BaseException as error:
            done.errors.append(error)
            over.set()
        finally:
            beats[number] = float("inf")

    def call(choose):
        (name, function), case = choose.choice(all_calls), choose.randrange(SEEDS)
        got = function(case)
        right = any(torch.equal(got, one) for one in wanted[name, case])
        with counting:
            done.calls += 1
            if not right:
                done.wrong.append((name, case))
            if done.calls >= calls or time.monotonic() - began > seconds:
                over.set()

    changing = threading.Lock()

    def change(choose):
        with changing:
            name = changes.one()
        done.changes[name] = done.changes.get(name, 0) + 1
        time.sleep(choose.random() * 0.02)

    works = [call] * THREADS + [change] * 2
    threads = [threading.Thread(target=guarded, args=args, daemon=True) for args in enumerate(works)]
    interval, count = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)
                if time.monotonic() - min(beats) > patience:
                    faulthandler.dump_traceback(all_threads=True)
                    raise AssertionError(f"a thread waits for over {patience} s: {done}")
    finally:
        over.set()
        sys.setswitchinterval(interval)
        torch.set_num_threads(count)
    done.seconds = time.monotonic() - began
    return done


if __name__ == "__main__":
    print(found := storm(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
    print(*map(repr, found.errors), *found.wrong[:20], sep="\n")
