"""Settings in messages, spelled as flags: the library writes `` `bits` ``, the command says `-b` or `-b/--bits`."""

import re
from collections.abc import Mapping, Sequence

_SETTING = re.compile(r"`([a-z_]+)`")


class Spelling:
    """Replaces names of settings in backticks by the flag as it was typed, or by all spellings of the flag."""

    def __init__(self, flags: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> None:
        """`flags` are the spellings by name of what the command takes, `arguments` its command line."""
        self._flags = flags
        self._typed = {_typed(argument, flags) for argument in arguments}

    def __call__(self, message: str) -> str:
        """The message for a person at the command line."""
        return _SETTING.sub(lambda match: self._flag(match[1]), message)

    def _flag(self, name: str) -> str:
        spellings = self._flags.get(name, ())
        typed = [flag for flag in spellings if flag in self._typed]
        return typed[0] if typed else "/".join(spellings) or name


def _typed(argument: str, flags: Mapping[str, Sequence[str]]) -> str:
    """The flag that an argument of the command line is or begins with, such as `-b` of `-b4.5`; empty for none."""
    known = [flag for spellings in flags.values() for flag in spellings]
    head = argument.partition("=")[0]
    if head in known:
        return head
    joined = [flag for flag in known if not flag.startswith("--") and argument.startswith(flag)]
    return max(joined, key=len, default="")
