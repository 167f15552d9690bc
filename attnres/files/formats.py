"""The version of the files of a run, a probe or a corpus, so that another version is refused and never misread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres.errors import AttnResError

# Of the folders that this version writes. A folder that names none is of version 1, the first.
VERSION = 1
# Of the tables of a probe. In version 1 the verdict `negligible` was a word that pandas reads as a missing value.
PROBE_VERSION = 2
KEY = "format"


def check_format(
    plain: Mapping[str, Any], where: Path, refusal: type[AttnResError], remedy: str, version: int = VERSION
) -> None:
    """Refuses a folder of another version.

    Args:
        plain: the JSON object of the folder that names its version under `KEY`.
        where: the folder or file, for the message.
        refusal: the error to raise.
        remedy: names the command that converts it, or what else to do.
        version: the one that is read.

    Raises:
        AttnResError: `refusal`, in one line.
    """
    named = plain.get(KEY, 1)
    if named != version:
        raise refusal(f"{where}: format {named!r}, this version reads format {version}; {remedy}")
