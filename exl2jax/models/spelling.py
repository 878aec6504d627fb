"""The spelling of `config.json` that the stock runtime reads; this package reads it too, and writes it.

Newer `transformers` keep rotary settings under `rope_parameters`, leave out keys that have a default, and say per layer
what used to be a pattern. The stock runtime knows the older keys only and takes its own defaults silently, so the
written config must hold them. A config in the older spelling is copied unchanged.
"""

from collections.abc import Mapping
from typing import Any

from exl2jax.models.registry import Architecture

TEXT_SECTION = "text_config"
_MOVED = ("rope_theta", "partial_rotary_factor")
_NEEDS_ORIGINAL = ("yarn", "llama3")


def stock_spelling(raw: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The config with every key that the stock runtime reads, in the place where it reads it."""
    out = dict(raw)
    if isinstance(out.get(TEXT_SECTION), dict):
        out[TEXT_SECTION] = _old_rope(out[TEXT_SECTION])
    out = _old_rope(out)
    inner = out.get(TEXT_SECTION)
    text = inner if isinstance(inner, dict) else {}
    for section in (out, text):
        scaling = section.get("rope_scaling")
        if isinstance(scaling, dict) and _kind(scaling) in ("su", "longrope"):
            _set(out, text, "original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    if text.get("partial_rotary_factor") is not None:
        _set(out, {}, "partial_rotary_factor", text["partial_rotary_factor"])
    for key, value in arch.defaults:
        _set(out, text, key, value)
    if arch.eps_keys and arch.eps_keys[0] not in dict(arch.stock_defaults):
        given = [v for k in arch.eps_keys for v in (out.get(k), text.get(k)) if v is not None]
        _set(out, text, arch.eps_keys[0], given[0] if given else 1e-6 if arch.norm == "rms" else 1e-5)
    hidden = out.get("n_embd")
    if arch.inner_multiple and isinstance(hidden, int) and out.get("n_inner") is None:
        out["n_inner"] = arch.inner_multiple * hidden
    if arch.window == "pattern":
        _set_pattern(out, text, arch)
    return out


def _set(out: dict[str, Any], text: Mapping[str, Any], key: str, value: Any) -> None:
    """Write a key where neither level has it."""
    if value is not None and key not in out and key not in text:
        out[key] = value


def _set_pattern(out: dict[str, Any], text: Mapping[str, Any], arch: Architecture) -> None:
    """Write the period of full-attention layers at the outer level, the only one where stock reads it."""
    pattern = out.get("sliding_window_pattern", text.get("sliding_window_pattern"))
    types = out.get("layer_types", text.get("layer_types"))
    if pattern is None and isinstance(types, list) and "full_attention" in types:
        pattern = types.index("full_attention") + 1
    if pattern is None:
        pattern = arch.pattern
    if pattern != arch.stock_pattern or pattern != arch.pattern:
        out.setdefault("sliding_window_pattern", pattern)


def _old_rope(section: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of one level in the older spelling, with one name for the type of scaling."""
    out = dict(section)
    new = out.get("rope_parameters")
    if isinstance(new, dict):
        full = new.get("full_attention", new)
        local = new.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            out.setdefault("rope_local_base_freq", local["rope_theta"])
        if isinstance(full, dict):
            for key in _MOVED:
                if full.get(key) is not None:
                    out.setdefault(key, full[key])
            scaling = {k: v for k, v in full.items() if k not in (*_MOVED, "full_attention", "sliding_attention")}
            if out.get("rope_scaling") is None and (_kind(scaling) or "default") != "default":
                out["rope_scaling"] = scaling
            elif out.get("rope_scaling") is None and "mrope_section" in scaling:
                out["rope_scaling"] = {"type": "mrope", "mrope_section": scaling["mrope_section"]}
    scaling = out.get("rope_scaling")
    if isinstance(scaling, dict):
        out["rope_scaling"] = _old_scaling(scaling, out)
    return out


def _old_scaling(scaling: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(scaling)
    if out.get("type") and out.get("rope_type"):
        kind = "mrope" if "mrope_section" in out else out["rope_type"]
        out = {"type": kind, **{k: v for k, v in out.items() if k not in ("type", "rope_type")}}
    if _kind(out) in _NEEDS_ORIGINAL and out.get("original_max_position_embeddings") is None:
        original = section.get("original_max_position_embeddings") or section.get("max_position_embeddings")
        if original is not None:
            out["original_max_position_embeddings"] = original
    return out


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type")
