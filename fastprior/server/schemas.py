"""Bodies of requests, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

from fastprior.server.settings import MOST_TEXT

Text = Annotated[str, StringConstraints(min_length=1, max_length=MOST_TEXT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# Values of these are checked where their widths are known, number by number and without a list of all errors
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, WithJsonSchema({"anyOf": [_BASE64, _NUMBERS]})]
Vectors = Annotated[Any, WithJsonSchema({"anyOf": [_BASE64, {"type": "array", "items": _NUMBERS}, {"type": "null"}]})]
Values = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"anyOf": [{"type": "number"}, _NUMBERS]}},
                {"type": "null"},
            ]
        }
    ),
]


class Options(BaseModel):
    """How embeddings are sampled; what is not given is the server's default."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=1000, description="the model's name, as /v1/models says")
    n: int = Field(1, ge=1, le=4096, description="embeddings of each input")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="of the first embedding's noise; the next ones have the numbers behind it"
    )
    steps: int | None = Field(None, ge=1, le=2**20, description="evaluations, as the solver counts them")
    solver: str | None = Field(None, max_length=100, description="ddpm, ddim, ddim_trailing, dpm++, sde-dpm++, learned")
    spacing: str | None = Field(None, max_length=100, description="of the solver's times: trailing, logsnr, karras")
    eta: Number | None = Field(None, description="noise of the ddim solvers")
    guidance_scale: Number = Field(1.0, description="classifier-free guidance; 1 is none")
    conditions: Values = Field(None, description="values of the extra conditions")
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False, description="seconds; then the answer is 504")


class EmbeddingsRequest(Options):
    """Texts, as OpenAI's embeddings API takes them; the answer holds *image* embeddings."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=4096, fail_fast=True)] = Field(
        description="one text or several"
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="if given, the width that embeddings have anyway")
    user: str | None = Field(None, max_length=1000, description="ignored")
    negative_prompt: str | None = Field(None, max_length=MOST_TEXT, description="for priors that have one")


class SampleRequest(Options):
    """The embedding of a text, and where the prior is conditioned on them its encodings, one vector a token."""

    text_embed: Vector = Field(description="(dim,): numbers, or base64 of fp32 or fp16")
    text_encodings: Vectors = Field(None, description="(length, dim), or base64 of fp32")
    encoding_format: Literal["float", "base64"] = "float"


class BinaryOptions(Options):
    """Options of a binary request, in the query of its address."""

    conditions: None = None
    encoding_format: Literal["float", "base64"] = "float"
