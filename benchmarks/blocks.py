"""A network of one's own made of the blocks, as brain decoding has it: it is not causal, so that nothing can be cached.

Its shape is that of a prior for 256 tokens of CLIP's ViT-bigG, conditioned on as many tokens that stand for the text.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = dict(dim=1664, depth=6, dim_head=52, heads=32, tokens=256)
QUICK = dict(dim=64, depth=2, dim_head=16, heads=4, tokens=8)


class TokenNetwork(nn.Module):
    """Tokens of an image from noisy ones, a time and tokens of a text; `blocks` is the module that has the blocks."""

    def __init__(self, blocks: ModuleType, dim: int, depth: int, dim_head: int, heads: int, tokens: int):
        super().__init__()
        self.to_time = nn.Sequential(blocks.SinusoidalPosEmb(dim), blocks.MLP(dim, dim))
        self.positions = nn.Parameter(torch.randn(tokens, dim) * dim**-0.5)
        self.rel_pos_bias = blocks.RelPosBias(heads=heads)
        rotary = blocks.RotaryEmbedding(dim=min(32, dim_head))
        self.layers = nn.ModuleList(
            nn.ModuleList([
                blocks.Attention(dim=dim, dim_head=dim_head, heads=heads, causal=False, rotary_emb=rotary),
                blocks.FeedForward(dim=dim, mult=4),
            ])
            for _ in range(depth)
        )  # fmt: skip
        self.norm = blocks.LayerNorm(dim, stable=True)
        self.project_out = nn.Linear(dim, dim, bias=False)

    def forward(self, image: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """(batch, tokens, dim) of images and texts, (batch,) times: (batch, tokens, dim)."""
        x = torch.cat((text, self.to_time(times)[:, None], image + self.positions), dim=1)
        bias = self.rel_pos_bias(x.shape[1], x.shape[1] + 1, device=x.device)
        for attention, feed_forward in self.layers:
            x = attention(x, attn_bias=bias) + x
            x = feed_forward(x) + x
        return self.project_out(self.norm(x))[:, -image.shape[1] :]


def networks(device: torch.device, shape: dict) -> dict[str, TokenNetwork]:
    """Of our blocks, and where dalle2-pytorch is installed of its own, with the same weights."""
    import fastprior.dalle2_pytorch

    torch.manual_seed(0)
    made = dict(ours=TokenNetwork(fastprior.dalle2_pytorch, **shape))
    try:
        import dalle2_pytorch.dalle2_pytorch as peer
    except ImportError:
        print("without dalle2-pytorch only ours is measured")
    else:
        made["peer"] = TokenNetwork(peer, **shape)
        made["peer"].load_state_dict(made["ours"].state_dict())
    return {name: net.to(device) for name, net in made.items()}


def batch_of(rows: int, device: torch.device, shape: dict) -> dict[str, Tensor]:
    """What the network takes, and a target."""
    draw = torch.Generator().manual_seed(1)
    names = "image", "text", "target"
    made = {name: torch.randn(rows, shape["tokens"], shape["dim"], generator=draw).to(device) for name in names}
    return dict(**made, times=torch.rand(rows, generator=draw).to(device) * 1000)


def runner(net: nn.Module, batch: dict[str, Tensor], dtype: str, backward: bool) -> Callable[[], Tensor]:
    """A call of a network, under autocast where the dtype has 16 bits, and with `backward` the gradients of its loss.

    They are left to no one: a run begins and ends without gradients.
    """
    given, device = {name: t for name, t in batch.items() if name != "target"}, batch["image"].device.type

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
                out = net(**given)
            if backward:
                F.mse_loss(out.float(), batch["target"]).backward()
                net.zero_grad(set_to_none=True)
        return out.detach()

    return run


def gradients(net: nn.Module, batch: dict[str, Tensor], dtype: str) -> Tensor:
    """All gradients of the loss in a row, fp32."""
    given = {name: t for name, t in batch.items() if name != "target"}
    with torch.autocast(batch["image"].device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = F.mse_loss(net(**given).float(), batch["target"])
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.cat([grad.flatten().float() for grad in torch.autograd.grad(loss, weights)])


def has_bf16_tiles(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies tiles of bf16 (AMX): without them such products need not be faster than fp32's."""
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text().split()
