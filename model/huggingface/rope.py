"""RoPE in `config.json`, in both spellings: of transformers 4, which is also the one that we write, and of transformers 5."""

import dataclasses
import json
from typing import Any

from ...errors import UserError
from ...kernels.rope_tables import OPTIONS, RopeScaling
from ..config import ModelConfig
from .document import Document

_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(document: Document, context_length: int) -> tuple[float, float | None, RopeScaling]:
    """Return the theta of global and, where they have their own, of local layers, and the scaling of the global ones.

    `document` is whole, with the defaults of its family. What our tables cannot hold is a `UserError`.
    """
    # transformers 5 has all in one object; that of Gemma 3 has one in it for each kind of layer.
    new = document.object("rope_parameters")
    old = document.object("rope_scaling")
    outer = {name: document.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    local_theta = document.number("rope_local_base_freq", None)
    if "full_attention" in new.values or "sliding_attention" in new.values:
        full, local = new.object("full_attention"), new.object("sliding_attention")
        local.only("rope_type", "default")
        local_theta = local.number("rope_theta", local_theta)
        new = full
    parameters = Document(document.path, outer | _present(old) | _present(new))
    parameters.only("partial_rotary_factor", 1)
    return parameters.number("rope_theta", 10_000.0), local_theta, _scaling(parameters, document, context_length)


def _present(part: Document) -> dict[str, Any]:
    return {name: value for name, value in part.values.items() if value is not None}


def _scaling(parameters: Document, document: Document, context_length: int) -> RopeScaling:
    values = dict(parameters.values)
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in OPTIONS:
        *others, last = OPTIONS
        raise UserError(
            f"{document.path} has rope_type {json.dumps(kind)}, which our tables lack: only {', '.join(others)} and {last} can "
            "be read"
        )
    options = OPTIONS[kind]
    if "original_max_position_embeddings" in options:
        # Where it is missing transformers takes the context, and a value beside the object before one in it.
        outside = document.values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = outside or values.get("original_max_position_embeddings") or context_length
    if "factor" in options:
        parameters.number("factor")
    for name, value in values.items():
        if name not in _KNOWN and name not in options and value is not None:
            raise UserError(f"{document.path} has {name} {json.dumps(value)} for RoPE, which rope_type {kind} does not read")
    try:
        return RopeScaling(kind, **{name: values[name] for name in options if values.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{document.path} has a {kind} scaling of RoPE that cannot be: {error}") from error


def rope_document(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of `config.json` for the RoPE of global layers."""
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    values = {name: getattr(scaling, name) for name in OPTIONS[scaling.kind]}
    defaults = {each.name: each.default for each in dataclasses.fields(RopeScaling)}
    # transformers wants all of llama3's, and takes an absent one of the others for its default.
    written = {name: value for name, value in values.items() if scaling.kind != "yarn" or value != defaults[name]}
    written |= {"factor": scaling.factor}
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": scaling.kind, **written}}
