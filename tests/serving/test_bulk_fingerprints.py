"""What tells priors, CLIPs and step tables apart, and what does not."""

import json

import pytest
import torch

import fastprior
from fastprior.diffusion.solvers import step_table
from fastprior.serving.bulk import Embedder, Options, find_shards, fingerprints
from helpers.bulk_cases import write_caption_files, write_npy, write_prior
from helpers.learned import make_table, with_table
from helpers.priors import WordClip, make_prior


def described(name="ViT-B-32", pretrained="a.pt", seed=0, **options):
    torch.manual_seed(seed)
    clip = WordClip()
    clip.description = dict(make="open_clip", model=name, base_model_kwargs=dict(pretrained=pretrained, **options))
    return clip


def test_clips_are_told_apart_by_what_they_are_and_not_by_where_they_came_from():
    one = fingerprints.of_clip(described())
    assert json.loads(json.dumps(one)) == one
    assert fingerprints.of_clip(described(pretrained="/elsewhere/b.pt")) == one
    others = [described(name="ViT-B-32-quickgelu"), described(force_quick_gelu=True), described(seed=1)]
    for other in others:
        assert fingerprints.of_clip(other) != one
    torch.manual_seed(0)
    plain = fingerprints.of_clip(WordClip())
    assert plain == dict(model="WordClip", options={}, weights=one["weights"])


def test_tables_are_told_apart_by_their_numbers():
    prior = make_prior()
    tables = [make_table(prior, seed=seed) for seed in (0, 0, 1)]
    found = [fingerprints.of_table(table) for table in tables]
    assert found[0] == found[1] != found[2]
    assert fingerprints.of_table(step_table(prior.noise_scheduler, "dpm++", 5, prior.prediction)) is None


def test_runs_of_other_learned_tables_and_clips_differ(tmp_path):
    texts = find_shards(write_npy(tmp_path / "in"))
    options, runs = Options(solver="learned", timesteps=5, cond_scale=2.0), []
    for seed in (0, 0, 1):
        prior = with_table(make_prior(condition_on_text_encodings=False), seed=seed)
        runs.append(Embedder(prior, options).run(texts))
    assert runs[0] == runs[1] and {name for name in runs[0] if runs[0][name] != runs[2][name]} == {"learned_table"}
    captions, runs = find_shards(write_caption_files(tmp_path / "captions")), []
    for seed in (0, 1):
        prior = make_prior(clip=described(seed=seed), image_embed_dim=None)
        prior.clip = described(seed=seed)
        runs.append(Embedder(prior).run(captions))
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} == {"text_encoder"}


@pytest.mark.slow
def test_priors_of_the_same_weights_are_the_same_in_whatever_file(tmp_path):
    prior = make_prior(condition_on_text_encodings=False)
    loaded = fastprior.load(write_prior(tmp_path / "prior.safetensors"))
    one = fingerprints.of_prior(prior)
    assert fingerprints.of_prior(loaded) == one
    with torch.no_grad():
        loaded.net.learned_query[0] += 1e-3
    assert fingerprints.of_prior(loaded) != one
