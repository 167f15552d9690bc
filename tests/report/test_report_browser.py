"""The report in a real browser: headless Chromium at desk and phone width, in print, with and without scripts.

Screenshots of a report that a probe wrote, as they stand in docs/:
    ATTNRES_SCREENSHOTS=docs ATTNRES_PROBE=runs/probe_... python -m pytest -n 0 tests/report/test_report_browser.py
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attnres.report import report
from attnres.report.album import Drawing
from attnres.report.figures import effects as figures_effects
from attnres.report.figures import plotting
from tests.report.chromium import Chromium, find_chromium
from tests.report.test_report import HOSTILE
from tests.tables.fake_folder import MARGIN, cells_table, write_fake

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium here: apt-get install chromium")

# Contrast of every text with what is behind it, as WCAG defines it; the least and where.
CONTRAST = """(() => {
  const parse = (text) => {
    const v = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number), unit = text.startsWith("color(") ? 1 : 255;
    return [v[0] / unit, v[1] / unit, v[2] / unit, v.length > 3 ? v[3] : 1];
  };
  const light = (c) => c.slice(0, 3).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
  let least = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility()) continue;
    if (e.matches("script, style, option")) continue;
    let behind = e, ground = [1, 1, 1, 1];
    for (; behind; behind = behind.parentElement) {
      const colour = parse(getComputedStyle(behind).backgroundColor);
      if (colour[3] > 0) { ground = colour; break; }
    }
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, e.tagName + " " + e.className + ": " + e.textContent.slice(0, 40)];
  }
  return least;
})()"""
OUTSIDE = """[...document.querySelectorAll("body *")].filter((e) =>
  e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .plot, .panel, pre")).map(
  (e) => e.outerHTML)"""


def pages(pdf: Path) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def viewer_table() -> dict:
    reads = [{"read": k, "layer": k // 2, "sublayer": ("attn", "mlp")[k % 2], "sources": ["embedding", "running state"],
              "families": ["embedding", "current"]} for k in range(4)]  # fmt: skip
    tokens = ["def", " f", "\n", "</script><script>document.title='owned'</script>", "\u202eevil", HOSTILE]
    weights = [[w for k in range(len(tokens)) for w in (100 * k + read, 1000 - 100 * k - read)] for read in range(4)]
    sequences = [{"document": name, "tokens": tokens, "weights": weights} for name in ("a.py", HOSTILE)]
    return {"format": 1, "model": "attnres", "reads": reads, "sequences": sequences}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of tables that no model made, with one small figure wherever there may be figures."""
    folder = write_fake(tmp_path_factory.mktemp("browser") / "run")
    (folder / "viewer.json").write_text(json.dumps(viewer_table()), encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    for claim in summary["claims"]:
        claim["against"] = {"recency": "baseline larger", "uniform": "inconclusive"}
    summary["claims"].append({"claim": "w" * 400, "verdict": HOSTILE, "test": HOSTILE, "evidence": HOSTILE})
    summary["plan_notes"].append("p" * 400)
    (folder / "summary.json").write_text(json.dumps(summary))
    cells = cells_table()
    figure = figures_effects.effect_map(cells[cells["model"] == "attnres"], "attnres", 5.0, MARGIN)
    drawing = Drawing("effects", plotting.to_svg(figure), "The effect map of a model that was never trained.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda entries, tables: {entry.section: [drawing] for entry in entries})
        return report.write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_report_opens_without_a_message_and_loads_nothing(browser, page):
    browser.open(page)
    assert browser.messages == []
    assert browser.evaluate("document.title") == "AttnRes probe: attnres_small"
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where


def test_report_policy_stops_what_a_hostile_text_might_add(browser, page):
    browser.open(page)
    browser.evaluate("""(() => {
        const script = document.createElement("script");
        try { script.textContent = "document.title = 'owned'"; document.head.append(script); } catch (e) {}
        document.body.append(Object.assign(new Image(), {src: "https://example.invalid/x.png"}));
    })()""")
    assert browser.evaluate("document.title") == "AttnRes probe: attnres_small"
    assert any("Content Security Policy" in m or "TrustedScript" in m for m in browser.messages)


def test_viewer_shows_the_weights_of_the_token_that_is_pointed_at(browser, page):
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('.token').length") == 6
    point = "document.querySelectorAll('.token')[{}].dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))"
    browser.evaluate(point.format(3))
    shown = browser.evaluate("document.querySelector('.panel').innerText")
    assert "</script><script>document.title='owned'</script>" in shown and "30." in shown and "embedding" in shown
    browser.evaluate(point.format(4))
    assert "⟨U+202E⟩evil" in browser.evaluate("document.querySelector('.panel').innerText")
    browser.evaluate("""(() => { const s = document.getElementById('viewer-read'); s.value = '3';
        s.dispatchEvent(new Event('change')); })()""")
    shown = browser.evaluate("document.querySelector('.panel').innerText")
    assert "read 3: layer 1, MLP" in shown and "40.3 %" in shown and "59.7 %" in shown
    browser.evaluate(
        """document.querySelector('.tokens').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"""
    )
    assert browser.evaluate("document.querySelector('[aria-selected=true]').id") == "token-3"
    assert browser.messages == [] and browser.evaluate("document.title") == "AttnRes probe: attnres_small"


def test_cells_are_sorted_and_filtered(browser, page):
    browser.open(page)
    visible = "[...document.querySelectorAll('#cells-table tbody tr')].filter((r) => !r.hidden)"
    browser.evaluate("document.querySelectorAll('#cells-table button.sort')[3].click()")
    column = browser.evaluate(f"{visible}.map((r) => parseFloat(r.cells[3].dataset.v)).filter((v) => !isNaN(v))")
    assert column == sorted(column) and len(column) == 58
    assert browser.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    # Numbers that are shown as 1.2e−9 are sorted as numbers.
    heads = "[...document.querySelectorAll('#cells-table th[scope=col]')]"
    place = browser.evaluate(f"{heads}.findIndex((h) => h.textContent.startsWith('Displace'))")
    browser.evaluate(f"{heads}[{place}].querySelector('button').click()")
    column = browser.evaluate(f"{visible}.map((r) => parseFloat(r.cells[{place}].dataset.v)).filter((v) => !isNaN(v))")
    assert column == sorted(column) and len(column) == 58
    browser.evaluate("""(() => { const s = document.getElementById('cells-verdict'); s.value = 'excluded';
        s.dispatchEvent(new Event('change')); })()""")
    assert browser.evaluate(f"{visible}.length") == 14
    browser.evaluate("""(() => { const s = document.getElementById('cells-search'); s.value = 'recency older';
        s.dispatchEvent(new Event('input')); })()""")
    assert browser.evaluate(f"{visible}.every((r) => r.textContent.includes('older'))")
    assert browser.evaluate("document.querySelector('output').textContent").endswith("of 72 rows")


def test_report_fits_a_phone(browser, page):
    browser.open(page, width=390, height=844)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.evaluate(OUTSIDE) == [] == browser.messages
    small = (
        "Math.min(...[...document.querySelectorAll('p, li, dd')].map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert browser.evaluate(small) >= 12


def test_report_without_scripts_still_has_the_claims_and_the_cells(browser, page):
    browser.open(page, scripts=False)
    assert browser.evaluate("document.querySelectorAll('section[aria-labelledby=claims] tbody tr').length") >= 4
    assert browser.evaluate("document.querySelectorAll('#cells-table tbody tr').length") == 72
    assert "needs JavaScript" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.querySelectorAll('.controls').length") == 0
    assert browser.evaluate("[...document.querySelectorAll('h2')][0].id") == "claims"


def test_report_prints_whole_figures_and_no_controls(browser, page, tmp_path):
    browser.open(page, width=794, media="print")
    assert (
        browser.evaluate(
            "[...document.querySelectorAll('.controls, nav, #viewer-holder')].some((e) => e.checkVisibility())"
        )
        is False
    )
    # A4 is 297 mm high; 240 mm are 907 px.
    assert browser.evaluate("Math.max(...[...document.images].map((e) => e.getBoundingClientRect().height))") <= 908
    inside = "[...document.querySelectorAll('.plot')].every((e) => getComputedStyle(e).breakInside === 'avoid')"
    assert browser.evaluate(inside)
    pdf = browser.pdf(tmp_path / "report.pdf")
    assert pdf.read_bytes().startswith(b"%PDF") and pages(pdf) >= 3


def test_report_screenshots(browser, page, tmp_path):
    """Desk, viewer, phone and print; of a real probe, for docs/, where the environment names one."""
    out = Path(os.environ.get("ATTNRES_SCREENSHOTS", tmp_path))
    page = Path(os.environ["ATTNRES_PROBE"]) / "report.html" if "ATTNRES_PROBE" in os.environ else page
    browser.open(page)
    shots = [browser.screenshot(out / "report_desktop.png", (0, 0, 1280, 1500))]
    top = browser.evaluate("document.getElementById('viewer').getBoundingClientRect().top + scrollY")
    shots.append(browser.screenshot(out / "report_viewer.png", (0, top - 10, 1280, 760)))
    browser.open(page, width=390, height=844)
    shots.append(browser.screenshot(out / "report_phone.png", (0, 0, 390, 1700)))
    browser.open(page)
    pdf = browser.pdf(tmp_path / "report.pdf")
    if shutil.which("pdftoppm"):
        # Made of the PDF itself, because where pages break is what matters in print; page 4 of a real one has the maps.
        number = str(min(4, pages(pdf)))
        command = ["pdftoppm", "-png", "-r", "75", "-f", number, "-l", number, "-singlefile"]
        subprocess.run([*command, pdf, out / "report_print"], check=True)
        shots.append(out / "report_print.png")
    assert all(shot.read_bytes().startswith(b"\x89PNG") for shot in shots)
    assert all(5_000 < shot.stat().st_size < 400_000 for shot in shots)
