"""The formats that are compared, and the script that makes each."""

from dataclasses import dataclass

K_TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S")
I_TYPES = ("IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_S", "IQ4_XS")
AS_THEY_ARE = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ2_M", "IQ4_XS")
"""Types without joined rows: on a model of narrow rows the rest give much the same files."""
HALF_QUADRATIC = ((4, 64), (3, 64), (2, 16))
GROUPED = tuple((bits, group) for bits in (4, 3) for group in (128, 64, 32))
ROUNDED = ((4, 128), (4, 64), (3, 64), (2, 64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format at one setting: the `family` that a line of the plot connects, its `script` and that one's arguments."""

    key: str
    label: str
    family: str
    script: str
    arguments: tuple[str, ...]
    dear: bool = False
    """Runs only when it is named."""


def _bits(name: str, label: str, script: str, settings: tuple[tuple[int, int], ...], *, dear: bool) -> list[Format]:
    return [
        Format(
            key=f"{name}-{bits}-{group}",
            label=f"{label} {bits} bits, groups of {group}",
            family=label,
            script=script,
            arguments=("--bits", str(bits), "--group", str(group)),
            dear=dear,
        )
        for bits, group in settings
    ]


def _k_quants() -> list[Format]:
    found = []
    for join in (True, False):
        family = "llama.cpp, rows joined" if join else "llama.cpp"
        for kind in (*K_TYPES, *I_TYPES) if join else AS_THEY_ARE:
            name = f"{kind}{'-joined' if join else ''}"
            label = f"llama.cpp {kind}{', rows joined' if join else ''}"
            arguments = ("--type", kind, *(("--join",) if join else ()))
            found.append(Format(key=name, label=label, family=family, script="k_quants", arguments=arguments))
    return found


FORMATS = (
    *_k_quants(),
    *_bits("hqq", "HQQ", "half_quadratic", HALF_QUADRATIC, dear=False),
    *_bits("gptq", "GPTQModel", "gptq", GROUPED, dear=False),
    *_bits("autoround", "AutoRound", "auto_rounding", ROUNDED, dear=True),
)
"""All formats, in the order in which they run."""
