"""The installed dalle2-pytorch, under a private name, or stand-ins for its names where it is not installed.

Modules of fastprior, whatever their layer, are imported here by name when a client asks for what they hold (`OURS`).
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

from fastprior.version import __version__

PEER = "dalle2_pytorch"
PEER_VERSION = "1.15.6"
PRIVATE = "fastprior.peer.dalle2_pytorch"
PACKAGES = (PEER, f"{PEER}.dataloaders")
MODULES = (
    *PACKAGES,
    *(f"{PEER}.{name}" for name in (
        "cli", "dalle2_pytorch", "dataloaders.decoder_loader", "dataloaders.prior_loader",
        "dataloaders.simple_image_only_dataloader", "optimizer", "tokenizer", "trackers", "train_configs", "trainer",
        "utils", "version", "vqgan_vae", "vqgan_vae_trainer",
    )),
)  # fmt: skip
# the modules of fastprior that stand in for one of the peer's; cli is something else here
OURS = {
    PEER: "fastprior",
    f"{PEER}.dataloaders.prior_loader": "fastprior.dataloaders",
    **{f"{PEER}.{name}": f"fastprior.{name}" for name in (
        "dalle2_pytorch", "dataloaders", "optimizer", "tokenizer", "trackers", "train_configs", "trainer", "utils",
    )},
}  # fmt: skip
# names of the peer's package itself that fastprior's has not, or only on demand, and the module that defines each
PACKAGE_NAMES = {
    "CLIP": "x_clip",
    "DALLE2": f"{PEER}.dalle2_pytorch",
    "Decoder": f"{PEER}.dalle2_pytorch",
    "DecoderTrainer": f"{PEER}.trainer",
    "DiffusionPriorTrainer": f"{PEER}.trainer",
    "Unet": f"{PEER}.dalle2_pytorch",
    "VQGanVAE": f"{PEER}.vqgan_vae",
}
# what the peer's own code checks with isinstance, or constructs, when it is handed a prior or a CLIP
BRIDGED = (
    "BaseClipAdapter", "CoCaAdapter", "DiffusionPrior", "DiffusionPriorNetwork", "OpenAIClipAdapter",
    "OpenClipAdapter", "XClipAdapter",
)  # fmt: skip

__path__: list[str] = []  # makes this module a package, so that PRIVATE can be imported below it


class _StandIn(type):
    """The class of names that could not be imported: to call, subclass or look into one raises ImportError."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict, **_):
        for base in filter(is_stand_in, bases):
            raise ImportError(base._reason)
        return super().__new__(mcs, name, bases, namespace)

    def __call__(cls, *args, **kwargs):
        raise ImportError(cls._reason)

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise ImportError(cls._reason)


def stand_in(name: str, reason: str) -> type:
    """A class that can be imported and named, but raises ImportError(reason) when used; nothing is an instance."""
    return _StandIn(name, (), {"_reason": reason})


def is_stand_in(value: Any) -> bool:
    return isinstance(value, _StandIn)


# the peer, as a private copy


def _peer_spec(fullname: str) -> ModuleSpec | None:
    """Where the installed peer's module lies, whatever stands in `sys.modules` under its name."""
    path = None
    if parent := fullname.rpartition(".")[0]:
        above = _peer_spec(parent)
        path = above and above.submodule_search_locations
        if path is None:
            return None
    specs = (finder.find_spec(fullname, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None and spec.origin is not None), None)


class _Rename(ast.NodeTransformer):
    """Lets the copy's modules import each other: the peer writes `from dalle2_pytorch... import ...` throughout."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level == 0 and node.module.partition(".")[0] == PEER:
            node.module = PRIVATE + node.module[len(PEER) :]
        return node


class _PeerLoader(SourceFileLoader):
    def get_code(self, fullname: str):
        # not by way of the bytecode cache, which belongs to the package under its own name
        tree = _Rename().visit(ast.parse(self.get_source(fullname), self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == PRIVATE:  # its __init__ would import every trainer for the sake of one Unet
            module.__getattr__ = lambda name: getattr(ALIASES[PEER], name)
            return
        super().exec_module(module)
        if module.__name__ == f"{PRIVATE}.dalle2_pytorch":
            ours = importlib.import_module("fastprior.dalle2_pytorch")
            vars(module).update({name: getattr(ours, name) for name in BRIDGED})


class _PeerFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != PRIVATE and not fullname.startswith(PRIVATE + "."):
            return None
        name = PEER + fullname[len(PRIVATE) :]
        found = _peer_spec(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        options = dict(submodule_search_locations=found.submodule_search_locations)
        loader = _PeerLoader(fullname, found.origin)
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=loader, **options)


def peer_attribute(module: str, name: str) -> Any:
    """`name` of a module of the installed dalle2-pytorch (or of x_clip), or a stand-in where that cannot be imported.

    Raises AttributeError where the module has no such name.
    """
    try:
        found = importlib.import_module(PRIVATE + module[len(PEER) :] if module in MODULES else module)
    except ImportError as error:
        return stand_in(
            name,
            f"{name} is part of dalle2-pytorch, which fastprior passes on but does not replace, and {module} cannot be "
            f'imported here ({error}). Install it: pip install "fastprior[interop]"',
        )
    if not hasattr(found, name):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(found, name)


# the names that clients see


def _ours(fullname: str) -> ModuleType | None:
    return importlib.import_module(OURS[fullname]) if fullname in OURS else None


class _Alias(ModuleType):
    """What a module of the peer is while the drop-in is installed: fastprior's names first, then the peer's own."""

    def __init__(self, name: str):
        super().__init__(name, f"{name}, on fastprior")
        self.__spec__ = ModuleSpec(name, None, is_package=name in PACKAGES)
        if name in PACKAGES:
            self.__path__ = []
        if name in (PEER, f"{PEER}.version"):
            # what clients compare with the version in a checkpoint, so it says which release the behaviour is that of
            self.__version__ = PEER_VERSION
            self.__fastprior_version__ = __version__

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return self._public()
        if not name.startswith("_"):
            if self.__name__ == PEER and name in PACKAGE_NAMES:
                module = PACKAGE_NAMES[name]
                return getattr(ALIASES[module], name) if module in ALIASES else peer_attribute(module, name)
            try:
                ours = _ours(self.__name__)
            except ImportError as error:  # of an extra: clients may name what they never use
                return stand_in(name, str(error))
            if hasattr(ours, name):
                return getattr(ours, name)
            if self.__name__ not in (PEER, f"{PEER}.dalle2_pytorch"):  # whose fastprior counterparts ask the peer
                return peer_attribute(self.__name__, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def _public(self) -> list[str]:
        """What `import *` brings."""
        if self.__name__ == PEER:
            return [*PACKAGE_NAMES, *BRIDGED]
        ours = _ours(self.__name__)
        names = set(getattr(ours, "__all__", None) or (vars(ours) if ours else ()))
        try:
            names.update(vars(importlib.import_module(PRIVATE + self.__name__[len(PEER) :])))
        except ImportError:
            pass
        return sorted(name for name in names if not name.startswith("_"))


# what stands in `sys.modules` while the drop-in is installed, by the peer's names
ALIASES = {name: _Alias(name) for name in MODULES}
for _name, _alias in ALIASES.items():
    if _name != PEER:
        _parent, _, _child = _name.rpartition(".")
        setattr(ALIASES[_parent], _child, _alias)

sys.meta_path.insert(0, _PeerFinder())


def check_fits_peer(config: Mapping) -> None:
    """Raise ValueError for a network's arguments that dalle2-pytorch's has no equal of."""
    if config.get("make") == "prior_transformer":
        raise ValueError("the network is a PriorTransformer, which dalle2-pytorch has not")
    if not config.get("cosine_sim", True):
        raise ValueError("the network has cosine_sim=False; dalle2-pytorch has cosine similarity attention only")
    for name in ("text_dim", "text_embed_dim", "conditions"):
        if config.get(name) not in (None, config.get("dim")):
            raise ValueError(f"the network has {name}={config[name]!r}; dalle2-pytorch's has no such argument")
