"""The tables of verdicts on one design, and how they are written."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from attnres.statistics.design import Design
from attnres.tables import columns
from attnres.tables.columns import Table
from attnres.tables.folder import table_text, write_table


@dataclass(frozen=True)
class Judged:
    """Tables of verdicts, and the design that they are about."""

    design: Design
    cells: pd.DataFrame
    contrasts: pd.DataFrame
    dissociation: pd.DataFrame
    spearman: pd.DataFrame
    motifs: pd.DataFrame
    rescues: pd.DataFrame

    def texts(self) -> dict[str, str]:
        """File name -> its text."""
        return {table.name: table_text(table, frame) for table, frame in self._tables().items()}

    def write(self, folder: Path) -> None:
        """Writes each table into the folder."""
        for table, frame in self._tables().items():
            write_table(folder, table, frame)

    def _tables(self) -> dict[Table, pd.DataFrame]:
        tables = {
            columns.CELLS: self.cells,
            columns.CONTRASTS: self.contrasts,
            columns.DISSOCIATION: self.dissociation,
            columns.SPEARMAN: self.spearman,
            columns.MOTIFS: self.motifs,
        }
        return tables | {columns.RESCUES: self.rescues} if len(self.rescues) else tables
