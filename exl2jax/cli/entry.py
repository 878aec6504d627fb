"""The command as a process: arguments in, one command of the table, an exit code.

0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted with the work saved. Progress and messages go to stderr;
stdout carries the result only.
"""

import gc
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from exl2jax.cli.calibrate import calibrate_command
from exl2jax.cli.convert import convert_command
from exl2jax.cli.dequantize import dequantize_command
from exl2jax.cli.doctor import doctor_command
from exl2jax.cli.evaluate import eval_command
from exl2jax.cli.generate import generate_command
from exl2jax.cli.inspect import inspect_command
from exl2jax.cli.plan import plan_command
from exl2jax.cli.publish import publish_command
from exl2jax.cli.report import report_command
from exl2jax.cli.shared import Invocation, say
from exl2jax.cli.spelling import Spelling
from exl2jax.cli.sweep import sweep_command
from exl2jax.cli.verify import verify_command
from exl2jax.errors import Exl2JaxError, Interrupted
from exl2jax.stream.progress import StopFlag
from exl2jax.version import VERSION

COMMANDS: dict[str, Callable[..., int]] = {
    "plan": plan_command,
    "convert": convert_command,
    "verify": verify_command,
    "eval": eval_command,
    "generate": generate_command,
    "calibrate": calibrate_command,
    "inspect": inspect_command,
    "dequantize": dequantize_command,
    "report": report_command,
    "publish": publish_command,
    "sweep": sweep_command,
    "doctor": doctor_command,
}
"""Every command by its name; each returns its exit code."""

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Convert Hugging Face language models to mixed-precision EXL2 directories.",
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; every error of ours becomes one line on stderr."""
    stop = StopFlag()
    caught: list[int] = []
    restore = _install_handlers(stop, caught)
    group = get_command(app)
    spelling = _spelling(group, sys.argv[1:] if arguments is None else arguments)
    try:
        code = group(arguments, standalone_mode=False, obj=Invocation(stop=stop, spelling=spelling))
        if code == INTERRUPTED:  # Typer turns the second signal's KeyboardInterrupt into its exit code, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except Interrupted as e:
        say(spelling(str(e)))
        return 128 + caught[0] if caught else e.exit_code
    except Exl2JaxError as e:
        say(f"error: {spelling(str(e))}")
        return e.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted; run the same command to resume from the last checkpoint")
        return 128 + (caught[0] if caught else signal.SIGINT)
    except typer.Exit as e:
        return e.exit_code
    except TyperException as e:
        say(f"usage error: {e.format_message().rstrip('.')}; see --help")
        return 2
    finally:
        restore()


def _spelling(group: Any, arguments: Sequence[str]) -> Spelling:
    """The flags of the command that the arguments call, by the names of its parameters."""
    called = next((group.commands[word] for word in arguments if word in COMMANDS), None)
    options = [p for p in called.params if p.param_type_name == "option"] if called else []
    return Spelling({p.name: p.opts for p in options}, arguments)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"exl2jax {VERSION}")
        raise typer.Exit


def _install_handlers(stop: StopFlag, caught: list[int]) -> Callable[[], None]:
    """First SIGINT or SIGTERM: stop at the next module boundary; second: at once. Returns how to undo it."""

    def handle(number: int, _: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        caught.append(number)
        stop.ask()
        say("stopping after this module; a second signal stops at once")

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever has them
        before = {}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore


def run() -> None:
    """Entry point of the installed command."""
    gc.freeze()  # what was imported stays to the end; the collector would walk over it whenever programs are traced
    sys.exit(main())
