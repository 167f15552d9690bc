"""What the code in hostile files would do, if it ran: touch the file that `$CANARY` names."""

import os
from pathlib import Path


def touch(*_: object, **__: object) -> None:
    Path(os.environ["CANARY"]).touch()
