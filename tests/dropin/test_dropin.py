"""Clients of dalle2-pytorch, run on dalle2-pytorch and, unmodified, on fastprior: same weights, same seeds."""

from __future__ import annotations

import inspect
import json
import pickle
import random
import sys
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import fastprior
from fastprior import dropin, train_configs, utils
from fastprior.optimizer import get_optimizer
from fastprior.utils import Timer, import_or_print_error, print_ribbon
from helpers.dropin_clients import CLIENTS, PREAMBLE
from helpers.priors import relative_error
from helpers.processes import run_python, run_ranks

FORWARD_TOLERANCE, RUN_TOLERANCE = 1e-5, 1e-4  # of the scale of the peer's result: the drop-in contract

STOCK_OPTIONS = {
    "plain": ({}, {}),
    "self_cond": (dict(self_cond=True, normformer=True), {}),
    "v": ({}, dict(predict_v=True, sampling_final_clamp_l2norm=True)),
    "noise": ({}, dict(predict_x_start=False)),
    "clamps": (
        dict(num_time_embeds=2, num_image_embeds=2, num_text_embeds=2, norm_in=True, rotary_emb=False),
        dict(
            sampling_clamp_l2norm=True, sampling_final_clamp_l2norm=True, training_clamp_l2norm=True,
            init_image_embed_l2norm=True,
        ),
    ),
}  # fmt: skip
NET_OPTIONS = {
    "noncausal": (dict(causal=False), {}),
    "causal-self_cond-v": (dict(causal=True, self_cond=True), dict(predict_v=True)),
}
CASES = {
    f"{client}-{name}": (client, *options)
    for client in CLIENTS
    for name, options in (NET_OPTIONS if client == "foreign_net" else STOCK_OPTIONS).items()
    if client in ("overrides_p_sample", "overrides_the_ddpm_loop", "foreign_net", "divides_pred_in_place")
    or name == "plain"
    or (name == "self_cond" and client != "names_its_own_condition")
}


def play(client: str, net_options: dict, options: dict, on_fastprior: bool, state: dict | None = None):
    """Build the client's prior, give it `state` (or make one up), and run it: its namespace, prior, state, results."""
    with dropin.installed() if on_fastprior else nullcontext():
        space = {"__name__": "client"}
        exec(compile(PREAMBLE + CLIENTS[client], f"<{client}>", "exec"), space)
        torch.manual_seed(0)
        prior = space["build"](dict(net_options), dict(options))
        if state is None:
            with torch.no_grad():
                for parameter in prior.parameters():
                    if parameter.requires_grad:  # no gain left at 1; small, since at their first size a run is chaotic
                        parameter.mul_(0.5).add_(0.05 * torch.randn_like(parameter))
            state = {name: value.clone() for name, value in prior.state_dict().items()}
        prior.load_state_dict(state)
        torch.manual_seed(1)
        random.seed(1)
        return space, prior, state, {name: t.detach() for name, t in space["run"](prior).items()}


@pytest.mark.parametrize("case", CASES)
def test_client(peer, case):
    client, net_options, options = CASES[case]
    space, prior, state, wanted = play(client, net_options, options, on_fastprior=False)
    assert not isinstance(prior, fastprior.DiffusionPrior)
    assert space["calls"] == space["expected"]
    space, prior, _, actual = play(client, net_options, options, on_fastprior=True, state=state)
    assert isinstance(prior, fastprior.DiffusionPrior)
    assert space["calls"] == space["expected"]
    assert actual.keys() == wanted.keys()
    for name in wanted:
        tolerance = FORWARD_TOLERANCE if name.startswith("loss") else RUN_TOLERANCE
        if wanted[name].any():
            assert relative_error(actual[name], wanted[name]) < tolerance, name
        else:
            assert not actual[name].any(), name


# what is not fastprior's


class ToyClip(fastprior.BaseClipAdapter):
    dim_latent = property(lambda self: 16)
    image_size = property(lambda self: 8)
    image_channels = property(lambda self: 3)
    max_text_len = property(lambda self: 4)

    def embed_text(self, text):
        from fastprior.clip import EmbedTextReturn

        return EmbedTextReturn(torch.nn.functional.normalize(self.clip(text).sum(1), dim=-1), self.clip(text))


def test_decoder_and_dalle2_are_the_peers(peer):
    names = ("Decoder", "Unet", "DALLE2", "VQGanVAE", "DecoderTrainer")
    sources = [inspect.getsourcefile(getattr(peer, name)) for name in names]
    with dropin.installed():
        import dalle2_pytorch
        from dalle2_pytorch import CLIP, DALLE2, Decoder, DiffusionPrior, DiffusionPriorNetwork, Unet, VQGanVAE
        from dalle2_pytorch.dalle2_pytorch import NullVQGanVAE
        from dalle2_pytorch.vqgan_vae import NullVQGanVAE as SameNullVQGanVAE

        assert dalle2_pytorch.__version__ == dalle2_pytorch.version.__version__ == peer.__version__
        assert dalle2_pytorch.__fastprior_version__ == fastprior.__version__
        assert NullVQGanVAE is SameNullVQGanVAE and CLIP is peer.CLIP
        assert (Decoder, Unet, VQGanVAE) == (fastprior.Decoder, fastprior.Unet, fastprior.VQGanVAE)
        assert [inspect.getsourcefile(getattr(dalle2_pytorch, name)) for name in names] == sources

        torch.manual_seed(0)
        clip = ToyClip(torch.nn.Embedding(9, 16))
        unet = Unet(dim=8, image_embed_dim=16, text_embed_dim=16, cond_dim=8, channels=3, dim_mults=(1, 2),
                    cond_on_text_encodings=True, attn_dim_head=4, attn_heads=2, resnet_groups=4)  # fmt: skip
        decoder = Decoder(unet=unet, clip=clip, image_sizes=(8,), timesteps=2, learned_variance=False)
        net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4)
        dalle2 = DALLE2(prior=DiffusionPrior(net, clip=clip, timesteps=3), decoder=decoder)
        images = dalle2(torch.randint(1, 9, (2, 4)))
        assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    twin = pickle.loads(pickle.dumps(unet))  # by reference to a module that any process with fastprior can import
    assert type(twin) is Unet and all(torch.equal(a, b) for a, b in zip(twin.parameters(), unet.parameters()))


def test_the_peers_trainer_takes_our_prior(peer):
    pytest.importorskip("accelerate")

    def losses(on_fastprior, state=None):
        with dropin.installed() if on_fastprior else nullcontext():
            from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork, DiffusionPriorTrainer

            torch.manual_seed(0)
            net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4, num_timesteps=10)
            prior = DiffusionPrior(net, image_embed_dim=16, timesteps=10, condition_on_text_encodings=False)
            state = state or {name: value.clone() for name, value in prior.state_dict().items()}
            prior.load_state_dict(state)
            trainer = DiffusionPriorTrainer(prior, lr=1e-2, device="cpu", ema_beta=0.9, accelerator_cpu=True)
            torch.manual_seed(1)
            found = []
            for _ in range(3):
                found.append(trainer(text_embed=torch.randn(4, 16), image_embed=torch.randn(4, 16)))
                trainer.update()
            return found, state

    wanted, state = losses(on_fastprior=False)
    assert losses(on_fastprior=True, state=state)[0] == pytest.approx(wanted, rel=RUN_TOLERANCE)


def test_install_and_uninstall(peer):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dalle2_pytorch"}
    with pytest.warns(UserWarning, match="imported before"):
        dropin.install()
    try:
        dropin.install()  # once is enough, and says nothing more
        with dropin.installed():
            import dalle2_pytorch
        import dalle2_pytorch.train_configs as configs
        from dalle2_pytorch import tokenizer
        from dalle2_pytorch.optimizer import get_optimizer as optimizer
        from dalle2_pytorch.tokenizer import YttmTokenizer, tokenize

        assert dropin.is_installed() and dalle2_pytorch.DiffusionPrior is fastprior.DiffusionPrior
        assert configs.TrainDiffusionPriorConfig is train_configs.TrainDiffusionPriorConfig
        assert configs.TrainDecoderConfig.__name__ == "TrainDecoderConfig"  # the peer's
        assert optimizer is get_optimizer and tokenizer.tokenize is tokenize
        assert YttmTokenizer.__module__ == "fastprior.peer.dalle2_pytorch.tokenizer"
        space = {}
        exec("from dalle2_pytorch import *\nfrom dalle2_pytorch.dalle2_pytorch import *", space)
        assert space["DiffusionPrior"] is fastprior.DiffusionPrior and space["ResnetBlock"] and space["rearrange"]
        with pytest.raises(ModuleNotFoundError, match=r"dalle2_pytorch\.nothing"):
            import dalle2_pytorch.nothing
        for module in ("dalle2_pytorch", "dalle2_pytorch.dalle2_pytorch", "dalle2_pytorch.vqgan_vae"):
            with pytest.raises(ImportError, match="nothing"):
                exec(f"from {module} import nothing")
    finally:
        dropin.uninstall()
    dropin.uninstall()
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dalle2_pytorch"}
    assert after == before and sys.modules["dalle2_pytorch"] is peer
    assert peer.dalle2_pytorch.DiffusionPrior is peer.DiffusionPrior is not fastprior.DiffusionPrior


HEAVY = ("open_clip", "torchvision", "embedding_reader", "accelerate", "diffusers", "pydantic", "pandas", "kornia")


@pytest.mark.slow
def test_runs_a_script_without_the_peer(tmp_path):
    (tmp_path / "beside.py").write_text("from dalle2_pytorch.dalle2_pytorch import l2norm\n")
    (tmp_path / "client.py").write_text(
        textwrap.dedent(f"""
        import sys

        class Hidden:
            def find_spec(self, fullname, path=None, target=None):
                if fullname.split(".")[0] in ("dalle2_pytorch", "x_clip"):
                    raise ModuleNotFoundError(f"No module named {{fullname!r}}", name=fullname)

        sys.meta_path.insert(0, Hidden())

        import torch
        from typing import Optional
        import dalle2_pytorch
        from beside import l2norm
        from dalle2_pytorch import (
            CLIP, DALLE2, Decoder, DecoderTrainer, DiffusionPrior, DiffusionPriorNetwork, Unet,
        )
        from dalle2_pytorch.dalle2_pytorch import ResnetBlock
        from dalle2_pytorch.vqgan_vae import VQGanVAE
        from dalle2_pytorch.utils import Timer, print_ribbon

        def decode(decoder: Optional[Decoder] = None) -> Unet: ...

        def refuses(use):
            try:
                use()
            except ImportError as error:
                return "dalle2-pytorch" in str(error) and "pip install" in str(error)

        for missing in (CLIP, DALLE2, Decoder, DecoderTrainer, ResnetBlock, VQGanVAE):
            assert refuses(missing) and refuses(lambda: missing.sample) and not isinstance(1, missing)
            assert refuses(lambda: type("Mine", (missing,), {{}})), missing
            source = "class Mine(missing, torch.nn.Module): pass"
            assert refuses(lambda: exec(source, dict(missing=missing, torch=torch)))
        try:
            from dalle2_pytorch.dalle2_pytorch import NeverThere
        except ImportError:
            pass
        else:
            raise AssertionError
        heavy = set({HEAVY!r}) - {{"accelerate"}}  # which the module of the trainers needs
        assert not heavy & sys.modules.keys()
        if __name__ == "__main__":
            net = DiffusionPriorNetwork(dim=16, depth=1, dim_head=8, heads=2, max_text_len=4)
            prior = DiffusionPrior(net, image_embed_dim=16, timesteps=5, condition_on_text_encodings=False)
            embeds = prior.p_sample_loop((2, 16), text_cond=dict(text_embed=l2norm(torch.randn(2, 16))))
            print(sys.argv[1:], type(prior).__module__, tuple(embeds.shape), dalle2_pytorch.__version__)
    """)
    )
    wanted = "['--name', 'x'] fastprior.prior.diffusion_prior (2, 16) 1.15.6\n"
    assert run_python("-m", "fastprior.dropin", tmp_path / "client.py", "--name", "x") == wanted
    assert run_python("-m", "fastprior.dropin", "-m", "client", "--name", "x", cwd=tmp_path) == wanted


def import_training_modules():
    dropin.install()
    from dalle2_pytorch import DiffusionPriorTrainer
    from dalle2_pytorch.dataloaders import get_reader, make_splits
    from dalle2_pytorch.trackers import Tracker
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as same

    assert same is DiffusionPriorTrainer
    found = [part.__module__ for part in (DiffusionPriorTrainer, Tracker, get_reader, make_splits)]
    wanted = ["trainer.trainer", "trackers.tracker", "dataloaders.readers", "dataloaders.readers"]
    assert found == [f"fastprior.{name}" for name in wanted]


@pytest.mark.slow
def test_the_training_modules_are_ours(tmp_path):
    run_ranks(1, import_training_modules, (), tmp_path)


@pytest.mark.slow
def test_import_is_light_and_a_trainer_without_its_extra_says_so_on_use():
    others = "torch._dynamo", "dalle2_pytorch", "fastprior.peer.dalle2_pytorch"
    script = f"""
    import sys
    import fastprior
    from fastprior import *
    import fastprior.dalle2_pytorch, fastprior.dropin
    heavy = [name for name in {(*HEAVY, *others)!r} if name in sys.modules]
    assert not heavy, heavy
    assert not hasattr(fastprior, "Nothing")

    sys.modules["accelerate"] = None
    fastprior.dropin.install()
    from dalle2_pytorch.trainer import DecoderTrainer, DiffusionPriorTrainer
    from fastprior import DiffusionPriorTrainer as same
    for trainer in (DiffusionPriorTrainer, same, DecoderTrainer):
        try:
            trainer()
        except ImportError as error:
            print("fastprior[train]" in str(error))
    """
    assert run_python("-c", textwrap.dedent(script)) == "True\nTrue\nTrue\n"


# optimizer, utils


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("frozen", [True, False], ids=["filtered", "all"])
@pytest.mark.parametrize("wd", [0.0, 0.1], ids=["adam", "adamw"])
def test_get_optimizer(peer, wd, frozen, group):
    from dalle2_pytorch.optimizer import get_optimizer as peers

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    module[0].requires_grad_(False)
    kwargs = dict(lr=2e-4, wd=wd, eps=1e-6, filter_by_requires_grad=frozen, group_wd_params=group)
    ours, theirs = get_optimizer(module.parameters(), **kwargs), peers(module.parameters(), **kwargs)
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults
    assert len(ours.param_groups) == len(theirs.param_groups)
    for our, their in zip(ours.param_groups, theirs.param_groups):
        assert [id(p) for p in our.pop("params")] == [id(p) for p in their.pop("params")]
        assert our == their


def test_get_optimizer_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="amsgrad"):
        get_optimizer([torch.nn.Parameter(torch.ones(2))], amsgrad=True)


def test_utils(monkeypatch):
    times = iter([1.0, 3.5, 4.0])
    monkeypatch.setattr(utils, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    timer = Timer()
    assert timer.elapsed() == 2.5 and timer.elapsed() == 3.0
    assert print_ribbon("x", "-", 2) == "-- x --"
    assert import_or_print_error("json") is json
    with pytest.raises(ImportError, match="install the package nothing"):
        import_or_print_error("no_such_package", "install the package nothing")
