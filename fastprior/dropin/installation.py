"""Run clients of dalle2-pytorch on fastprior, unmodified.

    python -m fastprior.dropin client.py --its arguments
    python -m fastprior.dropin -m client.module --its arguments

or, before the client is imported, `fastprior.dropin.install()`, or `with fastprior.dropin.installed():`.

While installed, `dalle2_pytorch` and its modules are fastprior's for all that fastprior has: the prior, its network and
blocks, CLIP adapters, optimizer, tokenizer, utils, prior configs. Every other name (Decoder, Unet, VQGanVAE, the
trainers, ...) is that of the installed dalle2-pytorch; where it is not installed, a stand-in that raises ImportError
when it is used.

That dalle2-pytorch is loaded as a second copy, under the private name `fastprior.peer.dalle2_pytorch`, in which the
prior and the CLIP adapters are fastprior's too, so that its Decoder, DALLE2 and trainers accept them. The package
itself, if anybody imported it before, is left as it is and comes back with `uninstall()`.

Limits: it holds for the whole process, all threads included. Names that were taken from dalle2_pytorch before
`install()` stay what they were. A process that is spawned, rather than forked, begins without the drop-in.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from fastprior.peer import ALIASES, PEER

_LOCK = threading.RLock()
_REPLACED: dict[str, ModuleType] = {}


def is_installed() -> bool:
    return sys.modules.get(PEER) is ALIASES[PEER]


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == PEER or name.startswith(PEER + ".")]
    return {name: sys.modules.pop(name) for name in names}


def _install() -> bool:
    """Whether this put anything out of its place."""
    with _LOCK:
        if is_installed():
            return False
        _REPLACED.update(_take_out())
        sys.modules.update(ALIASES)
        return bool(_REPLACED)


def install() -> None:
    """From now on, `import dalle2_pytorch` means fastprior. Warns if dalle2_pytorch was imported already."""
    if _install():
        warnings.warn(
            "dalle2_pytorch was imported before fastprior.dropin.install(): what was taken from it until now stays "
            "as it is",
            stacklevel=2,
        )


def uninstall() -> None:
    """Undo `install()`: `dalle2_pytorch` is the package of that name again, if there is one."""
    with _LOCK:
        if is_installed():
            _take_out()
            sys.modules.update(_REPLACED)
            _REPLACED.clear()


@contextmanager
def installed() -> Iterator[None]:
    """`install()` for the length of a `with` block, without the warning; what was installed before stays so."""
    before = is_installed()
    _install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def main(argv: list[str] | None = None) -> None:
    """Run `script.py args...` or `-m module args...` as python would, with the drop-in installed."""
    args = sys.argv[1:] if argv is None else argv
    module = args[1:] if args[:1] == ["-m"] else None
    if not args or module == [] or args[0] in ("-h", "--help"):
        sys.exit("usage: python -m fastprior.dropin [-m module | script.py] [its arguments ...]")
    install()
    if module:
        sys.argv = module
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(args[0]))
        runpy.run_path(args[0], run_name="__main__")
