"""Conversations as text: the chat template of a model, and the two spellings of messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError, ModelError
from exl2jax.storage import read_json

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"

SPEAKERS = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "tool_response": "tool"}
"""ShareGPT's names of speakers, with their roles; other names are roles already."""

type Message = Mapping[str, Any]
"""`role` and `content`, and further keys that templates know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A model's chat template in Jinja, the texts of the special tokens that it uses, and where it comes from."""

    source: str
    tokens: Mapping[str, str]
    where: str

    def render(self, messages: Sequence[Message], *, reply: bool = False) -> str:
        """The conversation as one text; with `reply`, the start of the assistant's next message stands at its end.

        The template runs in a sandbox and knows no time of day, so the same messages give the same text.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        values = {**self.tokens, "messages": list(messages), "add_generation_prompt": reply}
        try:
            return environment.from_string(self.source).render(**values)
        # A template can fail in any way that an expression of Python can.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
            raise CalibrationError(f"{self.where}: the chat template refuses this conversation ({e})") from e


def read_chat_template(model_dir: Path) -> ChatTemplate:
    """The chat template of a model directory; `ModelError` says that it has none and what to do."""
    config_path = model_dir / CONFIG_FILE
    config = read_json(config_path, ModelError, "the tokenizer's configuration") if config_path.is_file() else {}
    config = config if isinstance(config, dict) else {}
    path, where = model_dir / TEMPLATE_FILE, str(config_path)
    source: Any = config.get("chat_template")
    if path.is_file():
        source, where = _text(path), str(path)
    elif isinstance(source, list):  # several by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not isinstance(source, str) or not source:
        raise ModelError(
            f"{model_dir}: the model has no chat template ({TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}); "
            "take an instruction-tuned model, or give plain text"
        )
    return ChatTemplate(source=source, tokens=_special_tokens(config), where=where)


def encode_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to the start of the assistant's reply."""
    return tokenizer.encode(template.render(messages, reply=True)).tolist()


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content` from either spelling: those names, or ShareGPT's `from` and `value`."""
    if not isinstance(value, list) or not value:
        raise CalibrationError(f"{where}: a conversation is a list of messages, and this is none")
    messages = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise CalibrationError(f"{where}, message {index}: is not an object with role and content")
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise CalibrationError(f"{where}, message {index}: needs role and content (or from and value), both text")
        messages.append({"role": SPEAKERS.get(role, role), "content": content})
    return messages


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that templates name, as texts."""
    found = {}
    for key, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: the chat template cannot be read ({e})") from e


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
