"""`exl2jax generate`: let a directory write text."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exl2jax.calibration.chat import encode_chat, read_chat_template
from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver, invocation, say, set_up
from exl2jax.errors import SettingsError
from exl2jax.generation import Generation, ResidentModel, Sampling, encode_prompt, generate, load_resident
from exl2jax.hub import source_directory
from exl2jax.stream.progress import StopFlag

type Write = Callable[[str], None]


def generate_command(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="Hugging Face or EXL2 directory, or ORG/NAME[@REVISION].")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the model by its chat template: one message a line, from stdin.")
    ] = False,
    new_tokens: Annotated[int, typer.Option("--max-new", help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this share only.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another directory, shown beside the first on the same prompt.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write text token by token, and say how fast; --against shows two models side by side."""
    if (prompt is None) == (not chat):
        raise SettingsError("give --prompt TEXT, or --chat to talk line by line")
    if chat and (against is not None or as_json):
        raise SettingsError("--chat shows one model as it writes; leave --against and --json out")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed, new_tokens=new_tokens)
    set_up(Console(stderr=True))
    directory, against = source_directory(directory), against and source_directory(against)
    stop = invocation(context).stop
    if chat:
        return _converse(directory, sampling, stop)
    assert prompt is not None  # one of the two was given
    live = not as_json and against is None
    if live:
        _write(prompt)
    found = []
    for path in [directory, *([against] if against else [])]:
        resident = load_resident(path)
        found.append(
            generate(resident, encode_prompt(resident, prompt), sampling, show=_write if live else None, stop=stop)
        )
        del resident  # its weights, before the next one's
    if live:
        _write("\n")
        say(speed(found[0]))
    else:
        records = [_record(each) for each in found]
        deliver(as_json, records[0] if against is None else {"generations": records}, lambda: side_by_side(found))
    return 130 if stop.asked else 0


def speed(found: Generation) -> str:
    """One line on how long a text took."""
    rate = found.tokens_per_second
    said = "" if rate is None else f", {rate:.1f} tokens per second"
    return (
        f"{len(found.ids)} tokens{said}; first token after {found.prompt_seconds:.1f} s "
        f"({found.prompt_tokens} tokens of prompt); stopped by {found.ended}"
    )


def side_by_side(found: list[Generation]) -> Table:
    """Texts of several models on one prompt, a column each."""
    table = Table(show_lines=True)
    for each in found:
        table.add_column(str(each.directory), overflow="fold", ratio=1)
    table.add_row(*(Text(each.text) for each in found))
    table.add_row(*(Text(speed(each)) for each in found))
    same = 0
    while len({each.ids[same : same + 1] for each in found}) == 1 and same < len(found[0].ids):
        same += 1
    table.caption = f"the first {same} tokens are the same"
    return table


def _record(found: Generation) -> dict[str, Any]:
    rate = found.tokens_per_second
    return {**asdict(found), "directory": str(found.directory), "tokens_per_second": rate}


def _converse(directory: Path, sampling: Sampling, stop: StopFlag) -> int:
    """Answer the lines of stdin until it ends."""
    template = read_chat_template(directory)
    resident = load_resident(directory)
    messages: list[dict[str, str]] = []
    while not stop.asked and (line := _next_line()):
        messages.append({"role": "user", "content": line.rstrip("\n")})
        found = _answer(resident, encode_chat(resident.tokenizer, template, messages), sampling, stop)
        messages.append({"role": "assistant", "content": found.text})
    return 130 if stop.asked else 0


def _answer(resident: ResidentModel, ids: list[int], sampling: Sampling, stop: StopFlag) -> Generation:
    found = generate(resident, ids, sampling, show=_write, stop=stop)
    _write("\n")
    say(speed(found))
    return found


def _next_line() -> str:
    """The next line, asked for where a person types; empty at the end of input."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
