"""The byte-level BPE: trained on the train split, or one that exists already."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attnres.errors import DataError

EOS_TOKEN = "<|endoftext|>"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, the same one for the same texts; any text decodes to itself.

    Args:
        texts: Text to count pairs in.
        vocab_size: Most entries: `<|endoftext|>` (id 0), 256 bytes, merges. Little text gives fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def find_tokenizer(path: str, obtain: str | None = None) -> Path:
    """The `tokenizer.json` that `data.tokenizer` names; `obtain` is told where it is missing.

    Raises:
        DataError: There is none.
    """
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        remedy = f"make it with: {obtain}" if obtain else "give a tokenizer.json or a folder with one"
        raise DataError(f"data.tokenizer: {file} does not exist; {remedy}")
    return file


def load_tokenizer(file: Path) -> Tokenizer:
    """Reads a `tokenizer.json`; special tokens inside a text are read as plain text.

    Source code that mentions `<|endoftext|>` would otherwise end a document in its middle.

    Raises:
        DataError: It is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file}: not a readable tokenizer.json ({error}); give another") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, file: Path) -> int:
    """The id that ends a document: `<|endoftext|>`, else `eos_token` of `tokenizer_config.json` beside it.

    Raises:
        DataError: The tokenizer has neither.
    """
    names = [EOS_TOKEN]
    settings = file.with_name("tokenizer_config.json")
    if settings.is_file():
        named = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        names.append(named["content"] if isinstance(named, dict) else named)
    for name in names:
        if name is not None and (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise DataError(f"{file}: no {EOS_TOKEN} token, nor an eos_token in {settings.name} beside it; add one")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is what an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
