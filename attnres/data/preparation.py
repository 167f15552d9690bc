"""The corpus of a `DataConfig`: opens it, builds it from text, or mixes several.

A corpus that is built here is small: it lies in `data.cache_dir` under a name that its text and configuration decide.
"""

import hashlib
import json
import logging
import platform
import shutil
from pathlib import Path

import tokenizers

from attnres.data.config import DataConfig
from attnres.data.corpus.builder import Recipe, build, publish
from attnres.data.corpus.folder import Corpus, open_corpus
from attnres.data.corpus.manifest import FORMAT, MANIFEST, write_manifest
from attnres.data.text.sources import listing, log_left_out
from attnres.data.text.streams import FileStream
from attnres.data.text.tokenizer import find_tokenizer
from attnres.data.windows.mixing import mixture
from attnres.errors import DataError
from attnres.files.hashes import sha256_of
from attnres.files.whole_files import locked, storage_errors

logger = logging.getLogger(__name__)

_MAKE_SHARDS = "python -m attnres.commands.make_shards --help"


def prepare(config: DataConfig) -> Corpus:
    """Opens the corpus of `config`: a prepared folder, or several; else one built before from the same files, or now.

    The folder appears under its final name only when complete, and a lock lets one process build while others
    wait for it, so any number of ranks may call this at once.

    Raises:
        DataError: There is no text, too little of it, or shards are missing or damaged, or have another tokenizer.
        StorageError: The cache folder cannot be written.
    """
    corpus = _open_prepared(config) if config.source == "prepared" else _open_or_build(config)
    for split, counts in corpus.manifest["splits"].items():
        if counts["tokens"] <= config.sequence_length:
            raise DataError(
                f"data: split {split} has {counts['tokens']} tokens, fewer than one window of "
                f"{config.sequence_length} + 1; give more text or lower data.sequence_length"
            )
    return corpus


def _open_prepared(config: DataConfig) -> Corpus:
    corpora = []
    for path in map(Path, config.paths):
        if not (path.expanduser() / MANIFEST).is_file():
            remedy = f"make it with: {config.obtain}" if config.obtain else f"make it with {_MAKE_SHARDS}"
            raise DataError(f"data.paths: {path} holds no prepared token shards; {remedy}")
        corpora.append(open_corpus(path.expanduser()))
    if config.tokenizer is not None:
        wanted = sha256_of(find_tokenizer(config.tokenizer, config.obtain))
        for corpus in corpora:
            if corpus.tokenizer_sha256 != wanted:
                raise DataError(
                    f"data.tokenizer: {config.tokenizer} is {wanted[:8]}, but {corpus.path} was made with "
                    f"{corpus.tokenizer_sha256[:8]}; leave data.tokenizer out or prepare the text again"
                )
    return corpora[0] if len(corpora) == 1 else mixture(corpora, config.weights)


def _open_or_build(config: DataConfig) -> Corpus:
    final = Path(config.cache_dir).expanduser() / f"{config.source}-{_cache_key(config)}"
    if not final.exists():
        with storage_errors(final, "free space or set data.cache_dir"):
            final.parent.mkdir(parents=True, exist_ok=True)
            with locked(final.with_name(f"{final.name}.lock"), busy="", timeout=-1):
                if not final.exists():
                    _build_in_place_of(final, config)
    return open_corpus(final)


def _cache_key(config: DataConfig) -> str:
    """Hash of all that decides the shards, and of a listing of the source files."""
    decisive = {
        "format": FORMAT,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "source": config.source,
        "text_column": config.text_column,
        "seed": config.seed,
        "held_out": config.held_out,
        "max_bytes": config.max_bytes,
        "files": listing(config),
        "vocab_size": config.vocab_size if config.tokenizer is None else None,
        "tokenizer": _tokenizer_identity(config),
    }
    # In this order, unlike `content_hash`: it names the folders that are on disk.
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def _tokenizer_identity(config: DataConfig) -> list[str] | None:
    """Digests of the files that decide an existing tokenizer and its end-of-text id."""
    if config.tokenizer is None:
        return None
    file = find_tokenizer(config.tokenizer, config.obtain)
    files = [file, file.with_name("tokenizer_config.json")]
    return [sha256_of(path) for path in files if path.is_file()]


def _build_in_place_of(final: Path, config: DataConfig) -> None:
    """Builds beside `final` and renames. The caller holds the lock: an older attempt here was killed."""
    logger.info("preparing data.source=%s; later runs reuse it", config.source)
    log_left_out(config)
    recipe = Recipe(
        stream=FileStream(config),
        seed=config.seed,
        held_out=config.held_out,
        tokenizer=None if config.tokenizer is None else find_tokenizer(config.tokenizer, config.obtain),
        vocab_size=config.vocab_size,
        no_text=(
            f"data.source={config.source} holds no text (paths {list(config.paths)}, max_bytes {config.max_bytes}); "
            "give files with text, or raise data.max_bytes"
        ),
        max_bytes=config.max_bytes,
    )
    about = {"source": config.source, "seed": config.seed, "max_bytes": config.max_bytes}
    building = final.with_name(f"{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        manifest, _ = build(building, recipe, about)
        write_manifest(building, manifest)
        publish(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("prepared %d documents: %s", manifest["documents"], manifest["splits"])
