"""Where metrics go: a CSV file always, Weights & Biases when it works. Both are Lightning loggers."""

import csv
import io
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from attnres.files.whole_files import write_text
from attnres.training.config import LoggerConfig

log = logging.getLogger(__name__)

# Together below the five seconds that a server may cost which takes the connection and then says nothing.
_PROBE_SECONDS = 2.0
_INIT_SECONDS = 3.0
METRICS = "metrics.csv"


class _BaseLogger(Logger):
    @property
    def name(self) -> str:
        return "attnres"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Configuration is in config.yaml."""

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Several rows of one step, all with the same columns."""

    def alert(self, title: str, text: str) -> None:
        """Sends a message to a person who is not looking; by default to nobody."""


class CsvLogger(_BaseLogger):
    """One row per logged step: `step`, `tokens`, then a column per metric, empty where it was not measured.

    Numbers are written with `repr`, so that reading them back gives the same float.

    Args:
        resume_step: rows after this step are dropped on opening, so that the curve of a resumed run has no seam.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        super().__init__()
        self.path = path
        self._columns = ["step", "tokens"]
        self._resume_step = resume_step
        self._opened = False
        self._tables: dict[str, CsvLogger] = {}

    @rank_zero_only
    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Into `<name>.csv` beside the metrics, a line per row."""
        table = self._tables.setdefault(name, CsvLogger(self.path.with_name(f"{name}.csv"), self._resume_step))
        for row in rows:
            table.log_metrics(row, step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.open()
        row = {"step": str(step)} | {name: _text(value) for name, value in metrics.items()}
        new = [name for name in row if name not in self._columns]
        if new:
            earlier = self._read()
            self._columns += new
            self._rewrite([*earlier, row])
            return
        with open(self.path, "a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self._columns, restval="").writerow(row)

    @rank_zero_only
    def open(self) -> None:
        """Reads what an earlier process wrote, up to the resumed step."""
        if self._opened:
            return
        self._opened = True
        rows = self._read() if self.path.exists() else []
        self._rewrite([r for r in rows if int(r["step"]) <= self._resume_step])

    def _read(self) -> list[dict[str, str]]:
        """The rows in the file, which alone remembers them: a long run has many."""
        columns, rows = _read(self.path)
        self._columns = columns or self._columns
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())


class WandbLogger(_BaseLogger):
    """Weights & Biases that can fail at any point without more than one warning and a few seconds.

    Online without a server that answers becomes offline: `wandb sync` uploads the folder later.

    Args:
        folder: of the run, whose name is the name and id of the run there.
        plain: the run's configuration, without secrets.
        resume_step: what the CSV files hold up to this step is logged again at the start. An earlier process may have
            been killed before W&B had written it.
    """

    def __init__(self, config: LoggerConfig, folder: Path, plain: dict[str, Any], resume_step: int) -> None:
        super().__init__()
        self._resume_step = resume_step
        self._config = config
        self._folder = folder
        self._plain = plain
        self._run: Any = None
        self._off = config.wandb == "disabled"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._attempt("log", lambda: self._running().log({"step": step, **metrics}, step=step))

    @rank_zero_only
    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        def send() -> None:
            self._running().log({name: _wandb_table(rows)}, step=step)

        if rows:
            self._attempt("log a table", send)

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        self._attempt("alert", lambda: self._running().alert(title=title, text=text))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            code = 0 if status == "success" else 1
            # An upload that hangs must not keep a finished run from ending.
            self._attempt("finish", lambda: _within(_INIT_SECONDS, lambda: run.finish(exit_code=code)))

    def _running(self) -> Any:
        if self._run is None:
            self._run = self._start()
            if self._resume_step > 0:
                self._log_again(self._run)
        return self._run

    def _log_again(self, run: Any) -> None:
        """Steps that the server has already are left out; it would refuse them."""
        steps: dict[int, dict[str, Any]] = {}
        for path in sorted(self._folder.glob("*.csv")):
            for number, rows in groupby(_read(path)[1], key=lambda row: int(row["step"])):
                values = [{name: _value(text) for name, text in row.items() if name != "step" and text} for row in rows]
                row = values[0] if path.name == METRICS else {path.stem: _wandb_table(values)}
                steps[number] = steps.get(number, {}) | row
        for number in range(run.step, self._resume_step + 1):
            if number in steps:
                run.log({"step": number} | steps[number], step=number)

    def _start(self) -> Any:
        if self._config.wandb == "online":
            import wandb

            if _within(_PROBE_SECONDS, lambda: _answers(wandb.setup().settings.base_url)):
                try:
                    return self._init("online")
                except (Exception, SystemExit) as error:
                    reason = str(error)
            else:
                reason = "the server does not answer"
            log.warning("W&B logs offline (%s); upload later with `wandb sync` on %s/wandb", reason, self._folder)
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        # Host, environment and code are recorded by provenance.json, on our terms.
        wanted: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": _INIT_SECONDS,
            "login_timeout": _INIT_SECONDS,
            "finish_timeout": _INIT_SECONDS,
            "disable_git": True,
            "disable_code": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        # Which of these exist depends on the version.
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            id=self._folder.name,
            name=self._folder.name,
            resume="allow" if mode == "online" else None,
            dir=str(self._folder),
            config=self._plain,
            mode=mode,
            settings=wandb.Settings(**known),
        )

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        if self._off:
            return
        try:
            action()
        # Whatever a logging service raises, SystemExit included, training goes on.
        except (Exception, SystemExit) as error:
            self._off = True
            log.warning("W&B failed to %s and is off for this run; metrics.csv goes on: %s", what, error)


def _answers(url: str) -> bool:
    """Whether anything speaks HTTP there, through the proxy if one is set."""
    try:
        urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """The result of `action`, or None if it takes longer or fails; a daemon thread may be left behind."""
    result: list[Any] = []

    def run() -> None:
        with suppress(Exception, SystemExit):
            result.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _wandb_table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns: list[str | int] = list(rows[0])
    return wandb.Table(columns=columns, data=[[row[str(column)] for column in columns] for row in rows])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a file that `CsvLogger` wrote."""
    with open(path, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        # The last line of a killed process may be cut off anywhere.
        rows = [r for r in reader if None not in r and None not in r.values() and r["step"].isdigit()]
        return list(reader.fieldnames or ()), rows


def _text(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _value(text: str) -> float | str:
    """What `_text` was given."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
