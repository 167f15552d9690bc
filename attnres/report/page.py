"""From a context to a page: the templates, the page's policy, and files written as a whole or not at all.

The page runs one script, ours, and may load nothing: its content-security policy allows the style and the script by
their hashes. Everything from a table is escaped, because a token, a path or a configuration may hold anything.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from attnres import faults
from attnres.errors import ConfigError
from attnres.files.whole_files import storage_errors, write_text
from attnres.report import words
from attnres.report.album import Drawing

_TEMPLATES = Path(__file__).parent / "templates"


def _visible(value: Any) -> Any:
    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment(autoescape: bool) -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=autoescape,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "nats": words.nats,
        "share": words.share,
        "p": words.probability,
        "count": words.count,
        "slug": words.slug,
        "md": words.markdown,
        "compared": words.compared,
        "adjusted": words.adjusted,
        "indented": lambda v: json.dumps(v, indent=2, ensure_ascii=False, default=str),
    }
    env.globals |= {
        "interval": words.interval,
        "cell_name": words.cell_name,
        "table": words.markdown_table,
        "sublayers": words.SUBLAYER_NAMES,
        "measures": words.MEASURE_NAMES,
    }
    return env


def render_html(template: str, context: Mapping[str, Any]) -> str:
    """A page with its style and its script inside."""
    # Both are ours and hold no input; their hashes are what the policy allows.
    assets = {kind: (_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")}
    digests = {
        f"{kind}_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in assets.items()
    }
    inside = {kind: Markup(text) for kind, text in assets.items()}
    return _environment(autoescape=True).get_template(template).render(**context, **inside, **digests)


def render_text(template: str, context: Mapping[str, Any]) -> str:
    """The same for a terminal: what the template does not pass through `md` is its own."""
    return _environment(autoescape=False).get_template(template).render(**context)


def write_report_files(out: Path, files: Mapping[str, str], drawings: Mapping[str, Sequence[Drawing]]) -> None:
    """Writes the figures and then `files`, each whole or not at all.

    Args:
        out: the folder; made if it is missing.
        files: name -> text, in the order in which they are written.
        drawings: the figures by section, written as `figures/<stem>.svg`.

    Raises:
        ConfigError: a name is a link that leads out of the folder.
        StorageError: a file cannot be written.
    """
    figures = {f"figures/{drawing.stem}.svg": drawing.svg for section in drawings.values() for drawing in section}
    with storage_errors(out, "name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
    for name, text in (figures | dict(files)).items():
        with storage_errors(out / name, "free space or make it writable"):
            _write(out, name, text)


def _write(out: Path, name: str, text: str) -> None:
    path = out / name
    path.parent.mkdir(exist_ok=True)
    if not path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{path} is a link out of the probe folder: remove it and draw the report again")
    faults.point("report.write")
    # What UTF-8 cannot hold, half a surrogate pair in a name, becomes a question mark.
    write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))
