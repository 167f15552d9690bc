"""Generated text to train tiny models on."""

import random
from pathlib import Path

WORDS = ["if", "then", "else", "def", "return", "loop", "sum", "alpha", "beta", "gamma", "delta", "x", "y", "z"]


def write_texts(folder: Path, documents: int = 60) -> None:
    """Generated text files of 120 words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for i in range(documents):
        words = [draw.choice(WORDS) + str(draw.randrange(20)) for _ in range(120)]
        (folder / f"{i:02}.txt").write_text(" ".join(words))
