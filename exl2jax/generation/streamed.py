"""Text that grows token by token and is shown as soon as it is certain."""

from collections.abc import Callable, Sequence

from exl2jax.calibration import Tokenizer

BEFORE = 16
"""Tokens of the prompt that are decoded with the text: decoders drop a space at the start of what they are given."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoders write this for bytes that do not make a whole character yet."""


class StreamedText:
    """The text of the tokens added so far, cut at the first stop text; `show` gets it piece by piece.

    A piece is held back while it may be the start of a stop text or a part of a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], show: Callable[[str], None]
    ) -> None:
        """Begin after `prompt`."""
        self._tokenizer, self._show = tokenizer, show
        self._stops = [stop for stop in stops if stop]
        self._ids = list(prompt[-BEFORE:])
        self._before = len(tokenizer.decode(self._ids))
        self._shown = 0
        self.text = ""

    def add(self, token: int) -> bool:
        """Add a token; True where the text reached a stop text."""
        self._ids.append(token)
        self.text = self._tokenizer.decode(self._ids)[self._before :]
        found = [self.text.index(stop) for stop in self._stops if stop in self.text]
        if found:
            self.text = self.text[: min(found)]
            return True
        self._show_up_to(len(self.text) - self._uncertain())
        return False

    def close(self) -> None:
        """Show what was held back."""
        self._show_up_to(len(self.text))

    def _uncertain(self) -> int:
        """Characters at the end that the next token may change or a stop text may take away."""
        unfinished = len(self.text) - len(self.text.rstrip(UNFINISHED))
        starts = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max([unfinished, *starts])

    def _show_up_to(self, end: int) -> None:
        if end > self._shown:
            self._show(self.text[self._shown : end])
            self._shown = end
