"""The tables of verdicts on one design, and how they are written."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from attnres.files.whole_files import write_text
from attnres.statistics.design import Design
from attnres.tables import columns


@dataclass(frozen=True)
class Judged:
    """Tables of verdicts, and the design that they are about."""

    design: Design
    cells: pd.DataFrame
    contrasts: pd.DataFrame
    dissociation: pd.DataFrame
    spearman: pd.DataFrame
    motifs: pd.DataFrame

    def texts(self) -> dict[str, str]:
        """File name -> its text."""
        tables = {
            columns.CELLS: self.cells,
            columns.CONTRASTS: self.contrasts,
            columns.DISSOCIATION: self.dissociation,
            columns.SPEARMAN: self.spearman,
            columns.MOTIFS: self.motifs,
        }
        return {table.name: frame.to_csv(index=False) for table, frame in tables.items()}

    def write(self, folder: Path) -> None:
        """Writes each table into the folder."""
        for name, text in self.texts().items():
            write_text(folder / name, text)
