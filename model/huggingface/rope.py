"""RoPE in `config.json`: read the formats of transformers 4 and 5, write the format of transformers 4."""

import dataclasses
import json
from typing import Any

from ...errors import UserError
from ...rope_scaling import OPTIONS, RopeScaling
from ..config import ModelConfig
from .document import Document

_OTHER_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(document: Document, context_length: int) -> tuple[float, float | None, RopeScaling]:
    """Return the theta of global layers, the theta of local layers (None: the same), and the scaling of global layers.

    `document` includes the defaults of the family. An unsupported value is a `UserError`.
    """
    # transformers 5 has one object, which for Gemma 3 holds one object per kind of layer.
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
            f"{document.path} has rope_type {json.dumps(kind)}, which is not supported: expected {', '.join(others)} or {last}"
        )
    options = OPTIONS[kind]
    if "original_max_position_embeddings" in options:
        # transformers defaults to the context length, and prefers a value outside the object to one inside.
        outside = document.values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = outside or values.get("original_max_position_embeddings") or context_length
    if "factor" in options:
        parameters.number("factor")
    for name, value in values.items():
        if name not in _OTHER_FIELDS and name not in options and value is not None:
            raise UserError(f"{document.path} has {name} {json.dumps(value)} for RoPE, which rope_type {kind} does not use")
    try:
        return RopeScaling(kind, **{name: values[name] for name in options if values.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{document.path} has an invalid {kind} scaling of RoPE: {error}") from error


def rope_document(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of `config.json` for the RoPE of global layers."""
    scaling = config.rope_scaling
    if scaling.kind == "default":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    values = {name: getattr(scaling, name) for name in OPTIONS[scaling.kind]}
    defaults = {each.name: each.default for each in dataclasses.fields(RopeScaling)}
    # transformers requires every option of llama3, and gives the absent options of other kinds their defaults.
    written = {name: value for name, value in values.items() if scaling.kind != "yarn" or value != defaults[name]}
    written |= {"factor": scaling.factor}
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": scaling.kind, **written}}
