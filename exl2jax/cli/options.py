"""Options that more than one command takes."""

from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="Python file that registers variants (repeatable); it is run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
CalColumns = Annotated[
    list[str] | None, typer.Option("--cal-column", help="Column of Parquet, field of JSON (repeatable).")
]
CalDir = Annotated[Path | None, typer.Option("--cal-dir", help="Folder with local copies of the named sets.")]
CalSplit = Annotated[str, typer.Option("--cal-split", help="Split of the named sets: train or validation.")]
CalFill = Annotated[
    bool, typer.Option("--cal-fill", help="Let the model write the rows that the standard text cannot fill.")
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="A registered variant, KIND=NAME or KIND=NAME:SETTING=VALUE,... (repeatable)."),
]
Candidates = Annotated[
    str | None, typer.Option("--candidates", help="Rows of settings: stock, free, or a JSON file of your own.")
]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="PATTERN=BITS: one width for the linears named so (repeatable).")
]
ExcludeBits = Annotated[
    list[int] | None, typer.Option("--exclude-bits", help="A width that nothing may have (repeatable).")
]
