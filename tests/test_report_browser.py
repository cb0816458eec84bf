"""The report in a real browser, without a network: no error, every picture loads, mouse and keyboard switch them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from semseg_automl import SemanticSegmentor, draw_dataset
from semseg_automl.build import seeded_model
from semseg_automl.bundle import Bundle

SETTINGS: dict[str, Any] = {
    "model.input_size": 32,
    "model.decoder_dim": 32,
    "model.detail": False,
    "env.precision": "32-true",
}

# Before anything of the page runs.
WATCH = """<script>
var complaints = [];
addEventListener("error", function (event) { complaints.push(String(event.message || event.target)); }, true);
document.addEventListener("securitypolicyviolation", function (event) { complaints.push(event.violatedDirective); });
</script>"""

ACT = """<script>
addEventListener("load", function () {
  var tablists = Array.from(document.querySelectorAll('[role="tablist"]'));
  var cases = Array.from(tablists[0].querySelectorAll("button"));
  function shown(selector) {
    return Array.from(document.querySelectorAll(selector))
      .filter(function (each) { return each.offsetParent !== null; }).map(function (each) { return each.id; });
  }
  function press(key) {
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: key, bubbles: true, cancelable: true }));
    return document.activeElement.id;
  }
  function state() { return { cases: shown(".case"), views: shown(".stage figure") }; }
  function chosen(list) {
    return Array.from(list.querySelectorAll('[aria-selected="true"]')).map(function (each) { return each.id; });
  }
  var outcome = { start: state(), steps: [] };
  cases[0].focus();
  ["ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home", "x"].forEach(function (key) {
    outcome.steps.push([key, press(key), state().cases, chosen(tablists[0])]);
  });
  cases[2].click();
  outcome.clicked = state();
  document.querySelectorAll(".case")[2].querySelectorAll("button")[1].click();
  outcome.view = state();
  cases[1].click();
  outcome.kept = state();
  outcome.tabbable = cases.filter(function (each) { return each.tabIndex === 0; }).length;
  outcome.pictures = Array.from(document.images)
    .map(function (each) { return each.complete && each.naturalWidth > 0; });
  outcome.fetched = performance.getEntriesByType("resource").map(function (each) { return each.name.slice(0, 60); })
    .filter(function (name) { return name.indexOf("data:") !== 0; });
  outcome.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  dispatchEvent(new Event("beforeprint"));
  outcome.printed = Array.from(document.querySelectorAll("details")).every(function (each) { return each.open; });
  dispatchEvent(new Event("afterprint"));
  outcome.closed = Array.from(document.querySelectorAll("details")).every(function (each) { return !each.open; });
  outcome.complaints = complaints;
  var note = document.createElement("pre");
  note.id = "outcome";
  note.textContent = JSON.stringify(outcome);
  document.body.appendChild(note);
});
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's command; without one these tests skip by name."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("needs chromium, chromium-browser or google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of an untrained segmentor of four classes."""
    folder = tmp_path_factory.mktemp("page")
    data = draw_dataset(folder / "data", kind="multiclass", train=4, val=3, test=6, size=(40, 64))
    segmentor = SemanticSegmentor(path=folder, hyperparameters=SETTINGS, verbosity=0)
    segmentor.fit(data / "train.csv", data / "val.csv", dry_run=True)
    history = [{"epoch": i, "lr": 0.1, "train_loss": 1.0 / (i + 1), "miou": 0.1 * i} for i in range(3)]
    record = {"threshold": 0.5, "best_epoch": 2, "best_score": 0.2, "stopped_by": "patience", "history": history}
    segmentor.path_ = folder
    segmentor._adopt(Bundle(seeded_model(segmentor.plan_), segmentor.plan_, segmentor.task_, record))
    return segmentor.report(data / "test.csv", folder / "report.html", pictures=1).read_text(encoding="utf-8")


def browse(chromium: str, page: str, folder: Path, *options: str) -> dict[str, Any]:
    """Open a copy of the page that is watched and acted upon; return what it saw of itself."""
    copy = folder / "copy.html"
    copy.write_text(page.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{ACT}</body>"), encoding="utf-8")
    arguments = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"),
        *("--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}", "--dump-dom", *options),
    ]
    run = subprocess.run(
        [chromium, *arguments, copy.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r'<pre id="outcome">(.*?)</pre>', run.stdout, flags=re.DOTALL)
    assert found, f"the page said nothing of itself:\n{run.stderr[-2000:]}"
    outcome: dict[str, Any] = json.loads(html.unescape(found[1]))
    return outcome | {"console": [line for line in run.stderr.splitlines() if "CONSOLE" in line]}


@pytest.fixture(scope="module")
def outcome(chromium: str, page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return browse(chromium, page, tmp_path_factory.mktemp("desktop"), "--window-size=1200,900")


def test_report_in_a_browser__opened__complains_of_nothing_and_fetches_nothing(outcome: dict[str, Any]) -> None:
    assert outcome["complaints"] == outcome["console"] == []
    assert outcome["fetched"] == []
    assert outcome["pictures"] == [True] * 15
    assert outcome["overflow"] <= 0


def test_report_in_a_browser__opened__shows_one_image_beside_its_errors(outcome: dict[str, Any]) -> None:
    assert outcome["start"] == {"cases": ["case-0"], "views": ["view-0-0", "view-0-3"]}


def test_report_in_a_browser__keys__move_the_focus_and_the_image(outcome: dict[str, Any]) -> None:
    assert outcome["steps"] == [
        [key, f"case-tab-{at}", [f"case-{at}"], [f"case-tab-{at}"]]
        for key, at in (("ArrowRight", 1), ("End", 2), ("ArrowRight", 0), ("ArrowLeft", 2), ("Home", 0), ("x", 0))
    ]
    assert outcome["tabbable"] == 1


def test_report_in_a_browser__clicks__change_image_and_view_and_keep_the_view(outcome: dict[str, Any]) -> None:
    assert outcome["clicked"] == {"cases": ["case-2"], "views": ["view-2-0", "view-2-3"]}
    assert outcome["view"] == {"cases": ["case-2"], "views": ["view-2-0", "view-2-1"]}
    assert outcome["kept"] == {"cases": ["case-1"], "views": ["view-1-0", "view-1-1"]}


def test_report_in_a_browser__printing__opens_the_table_of_epochs(outcome: dict[str, Any]) -> None:
    assert outcome["printed"]
    assert outcome["closed"]


def test_report_in_a_browser__narrow_window__shows_one_picture_and_has_no_sideways_scroll(
    chromium: str, page: str, tmp_path: Path
) -> None:
    narrow = browse(chromium, page, tmp_path, "--window-size=500,900")
    assert narrow["overflow"] <= 0
    assert narrow["start"]["views"] == ["view-0-3"]


def test_report_in_a_browser__something_fetched__would_be_noticed(chromium: str, page: str, tmp_path: Path) -> None:
    spoilt = page.replace("</main>", '<img src="https://example.org/x.png"></main>')
    outcome = browse(chromium, spoilt, tmp_path)
    assert "img-src" in outcome["complaints"]
    assert outcome["console"] != []
    assert outcome["pictures"] == [True] * 15 + [False]
