"""The sort of a place, from the word that names it."""

import pytest

from attnres.depth.places import BANDS, place_kind


@pytest.mark.parametrize(
    ("band", "kind"),
    [
        *((band, "band") for band in BANDS),
        *(("layer0", "layer"), ("layer27", "layer"), ("block3", "block"), ("read56", "read")),
        # Several places are a composition, whatever the first of them is.
        *(("early+layer3", "composition"), ("early+late", "composition"), ("layer3+early", "composition")),
        *(("layer3+layer4", "composition"), ("read1+read2", "composition")),
        # No place: neither a band nor a plain number behind its unit.
        *(("", "other"), ("earl", "other"), ("early ", "other"), ("layer", "other"), ("layer03", "other")),
        *(("layer-1", "other"), ("layer3x", "other"), ("head3", "other"), ("layer12345678", "other")),
    ],
)
def test_place_kind_of_every_sort_of_place(band, kind):
    assert place_kind(band) == kind
