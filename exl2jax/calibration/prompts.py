"""Short openings for text that the model writes itself, by domain."""

from exl2jax.calibration import composition as domains

PROMPTS: dict[str, tuple[str, ...]] = {
    domains.WEB: (
        "Welcome back to our weekly newsletter!",
        "I bought this kettle two months ago and",
        "How to repair a leaking tap in five steps",
        "Local news: the council decided on Tuesday",
    ),
    domains.WIKI: (
        "The Danube is",
        "In the history of printing,",
        "Photosynthesis is the process by which",
        "The 19th century saw",
    ),
    domains.CODE: (
        "def read_config(path):\n",
        "#include <stdio.h>\n\nint main(",
        "SELECT name, COUNT(*) FROM",
        "function debounce(callback, delay) {\n",
    ),
    domains.TINY: (
        "Once there was a small owl who",
        "Mia and her brother went to the beach.",
        "The old clockmaker looked up when",
        "It had rained for three days, and",
    ),
    domains.MULTILINGUAL: (
        "Am Morgen lag Nebel über",
        "La bibliothèque du village",
        "En la plaza del mercado",
        "Весной река",
        "今天早上",
        "في المدينة القديمة",
    ),
    domains.TECHNICAL: (
        "Theorem. Let f be a continuous function on [0, 1].",
        "To compute the standard deviation,",
        "The enzyme catalyses the reaction",
        "A transformer steps the voltage down from",
    ),
}
"""Domain to prompts. They only start the text; the model goes on from there."""
