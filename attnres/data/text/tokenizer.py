"""The byte-level BPE: trained on the train split, or one that exists already."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attnres.errors import DataError
from attnres.files.whole_files import read_object

# Texts longer than this are encoded in pieces, of at most the second number of characters.
PIECE_CHARACTERS = 128 * 1024
LONGEST_PIECE = 2 * PIECE_CHARACTERS
# Between two words: the second keeps its space, as byte-level tokenizers have it.
_WORD_BORDER = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_CONTEXT = 256

EOS_TOKEN = "<|endoftext|>"
# Real vocabularies have few gaps; one id of four billion would ask for an embedding of that many rows.
_MOST_IDS_PER_ENTRY = 2
_SPARE_IDS = 1024


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
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic of its own on the unforeseen
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
    names: list[object] = [EOS_TOKEN]
    beside = file.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            named = read_object(beside).get("eos_token")
        except (OSError, ValueError) as error:
            raise DataError(f"{beside}: unreadable ({error}); restore it or leave it out") from error
        names.append(named.get("content") if isinstance(named, dict) else named)
    for name in names:
        # Half a surrogate pair is the name of no token, and the library takes none.
        if not isinstance(name, str) or name.encode("utf-8", "ignore").decode() != name:
            continue
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise DataError(f"{file}: no {EOS_TOKEN} token, nor an eos_token in {beside.name} beside it; add one")


def encode(tokenizer: Tokenizer, texts: Sequence[str], whole: bool = False) -> list[NDArray[np.uint32]]:
    """Ids `[tokens]` of each text, in bounded memory: the library needs 300 bytes per token while it encodes.

    Texts of more than `PIECE_CHARACTERS` are encoded in pieces. A piece ends where a new word begins and where encoding
    both sides apart gives what encoding them together gives, which is checked there: the ids are those of the whole
    text. Only where a run of `LONGEST_PIECE` characters has no such place is it cut regardless; the ids then differ at
    that place, and still decode to the text.

    Args:
        tokenizer: Encodes.
        texts: Texts of any length.
        whole: Encode all texts at once and uncut, on all cores, whatever memory that takes.
    """
    if whole:
        return _encode_batch(tokenizer, texts)
    ids: list[NDArray[np.uint32]] = []
    batch: list[str] = []
    for text in texts:
        if len(text) <= PIECE_CHARACTERS and sum(map(len, batch)) + len(text) <= PIECE_CHARACTERS:
            batch.append(text)
            continue
        ids += _encode_batch(tokenizer, batch)
        batch = []
        if len(text) <= PIECE_CHARACTERS:
            batch.append(text)
        else:
            ids.append(np.concatenate([_encode_batch(tokenizer, [piece])[0] for piece in _pieces(tokenizer, text)]))
    return ids + _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + LONGEST_PIECE
        for border in _WORD_BORDER.finditer(text, start + PIECE_CHARACTERS, end):
            before, after = text[border.start() - _CONTEXT : border.start()], text[border.start() :][:_CONTEXT]
            apart = np.concatenate(_encode_batch(tokenizer, [before, after]))
            if np.array_equal(apart, _encode_batch(tokenizer, [before + after])[0]):
                end = border.start()
                break
        yield text[start:end]
        start = end
    yield text[start:]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is what an embedding needs.

    Raises:
        DataError: There is no entry, or the largest id is far beyond their number.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= _MOST_IDS_PER_ENTRY * len(ids) + _SPARE_IDS:
        raise DataError(f"tokenizer: {len(ids)} entries with ids up to {max(ids, default=0):,}; give another")
    return max(ids) + 1
