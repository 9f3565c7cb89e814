"""Small prior transformers for the tests: diffusers', the same one as ours within diffusers, and as ours without."""

import copy

import torch

import fastprior
from fastprior.models.prior_transformer import prompt_memory
from fastprior.models.prior_transformer.model import PriorTransformer

CONFIG = dict(
    num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=20, num_embeddings=7,
    additional_embeddings=4,
)  # fmt: skip
TOLERANCE = 1e-5  # of scale, for a forward in fp32: two orders of summation


def make_stock(seed: int = 0, **config):
    """diffusers' own, with every weight random: it would start from zeros and ones in many."""
    from diffusers import PriorTransformer

    model = PriorTransformer(**{**CONFIG, **config}).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2 + (0.8 if weight.dim() == 1 else 0))
    return model


def within_diffusers(stock):
    return fastprior.accelerate_prior(copy.deepcopy(stock))


def without_diffusers(stock):
    config = {name: value for name, value in stock.config.items() if not name.startswith("_")}
    model = PriorTransformer(**config).to(stock.dtype).train(stock.training)
    model.load_state_dict(stock.state_dict())
    return model


MAKES = {"within": within_diffusers, "without": without_diffusers}


def kept(model) -> prompt_memory._Entry | None:
    """What is remembered of the last call of a model in this thread."""
    local = prompt_memory._SLOTS.get(model)
    slot = local and vars(local).get("slot")
    return slot and slot.entry


def make_inputs(config, rows: int = 4, tokens: int | None = None, mask: bool = True, seed: int = 0) -> dict:
    """Noisy embeddings (several tokens each where `tokens` is given) and a conditioning, full and padded rows in it."""
    draw = torch.Generator().manual_seed(seed)
    dim, length = config["embedding_dim"], config["num_embeddings"]
    given = dict(
        hidden_states=torch.randn(*((rows, dim) if tokens is None else (rows, tokens, dim)), generator=draw),
        timestep=torch.tensor(13),
        proj_embedding=torch.randn(rows, config["embedding_proj_dim"] or dim, generator=draw),
    )
    if config["encoder_hid_proj_type"] is not None:
        given["encoder_hidden_states"] = torch.randn(rows, length, dim, generator=draw)
    if mask:
        real = torch.tensor([length, length // 2, 1, length - 1])[torch.arange(rows) % 4]
        given["attention_mask"] = torch.arange(length) < real[:, None]
    return given
