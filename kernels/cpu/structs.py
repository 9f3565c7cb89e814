"""The structs of `c/`, field by field, which a call fills by name; a library whose sizes differ is not used."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, c_double, c_long, c_void_p


class Vector(Structure):
    """Numbers side by side; those of an argument that is not given have no data."""

    _fields_ = ("data", c_void_p), ("kind", c_long)


class Matrix(Structure):
    _fields_ = ("data", c_void_p), ("kind", c_long), ("stride", c_long)


class Weight(Structure):
    _fields_ = ("matrix", Matrix), ("scale", Vector)


def _flat(*names: str, struct: type[Structure]) -> Iterator[tuple[str, type]]:
    """The numbers of structs one by one, which takes half the time to fill: `x` for C's `x.data`, then `x_kind`, …"""
    for name in names:
        yield from ((name if field == "data" else f"{name}_{field}", kind) for field, kind in struct._fields_)


class Linear(Structure):
    """Of C's arrays of three, the numbers of the weight, those of the one beside, and room for a third."""

    _fields_ = (
        *_flat("x", "out", struct=Matrix),
        *_flat("weight", struct=Matrix), *_flat("scale", struct=Vector),
        *_flat("beside", struct=Matrix), *_flat("beside_scale", struct=Vector), ("third", Weight),
        *_flat("bias", "beside_bias", "third_bias", "stream_gain", "norm_gain", "norm_bias", struct=Vector),
        *((name, c_void_p) for name in ("stream", "residual", "total")),
        *((name, c_long) for name in ("columns", "beside_columns", "third_columns", "rows", "dim", "activation")),
        ("eps", c_double),
    )  # fmt: skip


class Decode(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_long) for name in ("kind", "q_row", "q_token", "kv_row", "kv_token")),
        ("prefix_k", c_void_p), ("prefix_v", c_void_p),
        *((name, c_long) for name in ("prefix_prompt", "prefix_token", "prefix_head")),
        *((name, c_void_p) for name in ("bias", "mask", "cos", "sin")),
        *((name, c_long) for name in ("rows", "seq", "suffix", "heads", "kv_heads", "dim_head")),
        *((name, c_long) for name in ("prompts", "prefix", "rotated", "cosine")), ("scale", c_double),
    )  # fmt: skip


class Block(Structure):
    """A row of the table that `Blocks.blocks` points to."""

    MATRICES = "q", "k", "v", "out", "expand", "contract"
    BIASES = tuple(f"{name}_bias" for name in MATRICES)
    NORMS = "norm_gain", "norm_bias", "out_gain", "ff_gain", "ff_bias", "inner_gain"
    _fields_ = *((name, Weight) for name in MATRICES), *((name, Vector) for name in (*BIASES, *NORMS))


class Blocks(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "out", "blocks")),
        *((name, c_long) for name in ("depth", "dim", "inner", "outputs", "head", "columns", "activation")),
        ("prefix_layer", c_long), ("attention", Decode), ("eps", c_double),
    )  # fmt: skip


class Run(Structure):
    _fields_ = (
        ("blocks", Blocks), ("time", c_void_p), ("null", c_void_p), ("coefficients", c_void_p), ("query", Vector),
        ("x", c_void_p), ("x0", c_void_p), ("clamp", c_long), ("cond_scale", c_double), ("radius", c_double),
    )  # fmt: skip


ALL = Vector, Matrix, Weight, Linear, Decode, Block, Blocks, Run
