"""What the models of a probe are to its trained one, from what `summary.json` says of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnres.tables.names import NULLS, WRAPS, Model

TRAINED = Model.TRAINED
# The wrap that may share the source convention of a trained model.
UNIFORM = Model.UNIFORM


@dataclass(frozen=True)
class Roles:
    """Names of the other models, in the order in which they were probed.

    Attributes:
        baselines: routing was not trained: wraps, and controls of which only the body was. What routing learned must
            exceed what is found in them.
        nulls: models in which nothing was trained, or whose routing was taken apart.
        trained_too: controls whose routing was trained as well. What routing learned may recur in them.
        shared: those baselines that see the sources as the trained model does.
    """

    baselines: tuple[str, ...]
    nulls: tuple[str, ...]
    trained_too: tuple[str, ...]
    shared: tuple[str, ...]

    @classmethod
    def of(cls, models: Sequence[Mapping[str, Any]], trained: str = TRAINED) -> "Roles":
        """The roles of `models`: rows of a summary, with `name`, `convention` and `routing_trained`.

        Where a row lacks the last, as in the committed replication, the name of a wrap and the configuration of a
        control's training decide.
        """
        others = {str(row["name"]): row for row in models if row["name"] != trained}
        mine = next((row.get("convention") for row in models if row["name"] == trained), None)
        nulls = tuple(name for name in others if name in NULLS)
        baselines = tuple(name for name, row in others.items() if name not in nulls and not _routing_trained(row))
        return cls(
            baselines,
            nulls,
            tuple(name for name in others if name not in (*baselines, *nulls)),
            tuple(name for name in baselines if others[name].get("convention") == mine),
        )

    @property
    def uniform(self) -> str | None:
        """The baseline that decides what was learned: the uniform wrap, if it shares the source convention."""
        return UNIFORM if UNIFORM in self.shared else None


def _routing_trained(row: Mapping[str, Any]) -> bool:
    trained = row.get("routing_trained")
    if trained is not None:
        return bool(trained)
    training = row.get("training")
    body_only = isinstance(training, Mapping) and training.get("trainable") == "body"
    return row["name"] not in WRAPS and not body_only
