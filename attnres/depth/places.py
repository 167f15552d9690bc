"""The words of a place in the depth and of a family of sources, in their order; each stands here once."""

import re
from typing import Literal

FAMILIES = ("embedding", "current", "recent", "older")
# What stands for a family where something is done to all sources of a read.
WHOLE_READ = "read"
SUBLAYERS = ("attn", "mlp")
BANDS = ("early", "mid", "late")
# What a grid is made of.
Places = Literal["bands", "layers", "blocks", "reads"]


# One layer, block or read by its number.
NUMBERED = re.compile(r"(layer|block|read)(0|[1-9][0-9]{0,5})")


def place_kind(band: str) -> str:
    """The sort of place that a cell's `band` names: `"band"`, `"layer"`, `"block"`, `"read"` or `"composition"`.

    Different places joined with `+` are a composition, which is no band, layer, block or read; a word that names no
    place is `"other"`.
    """
    if "+" in band:
        return "composition"
    numbered = NUMBERED.fullmatch(band)
    return "band" if band in BANDS else numbered[1] if numbered else "other"
