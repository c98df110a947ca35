"""The page in a real browser: what that complains of, what it fetches, and small windows, darkness and paper."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from reports import html

from .test_reports import HOSTILE, pages, source

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium")
WIDTHS = (400, 1200)
NAMES = ("several", "nothing", "everything", "hostile")
# Runs beside the page, in whose frames no script may run: what does not fit its frame, and text that stands out least
# from what is behind it (WCAG 2.2, contrast ratio).
SCRIPT = """
function luminance([r, g, b]) {
  const [R, G, B] = [r, g, b].map(each => (each /= 255) <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
  return 0.2126 * R + 0.7152 * G + 0.0722 * B;
}
const colour = text => text.match(/[\\d.]+/g).map(Number);
function behind(view, element) {
  for (; element; element = element.parentElement) {
    const found = colour(view.getComputedStyle(element).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
  return [255, 255, 255];
}
function faintest(view) {
  let least = [99, ""];
  for (const element of view.document.querySelectorAll("body *:not(svg):not(svg *)")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const [one, other] = [luminance(colour(view.getComputedStyle(element).color)), luminance(behind(view, element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < least[0]) least = [ratio, element.textContent.trim().slice(0, 40)];
  }
  return least;
}
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map(frame => {
    const root = frame.contentDocument.documentElement;
    return {room: root.clientWidth, wide: root.scrollWidth, faintest: faintest(frame.contentWindow),
            dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
            alternatives: [...root.querySelectorAll("svg")].filter(
              svg => svg.parentElement.tagName === "FIGURE" && !svg.getAttribute("aria-label")).length,
            text: root.textContent};
  });
  document.querySelector("pre").textContent = JSON.stringify(told);
});
"""


@functools.cache
def page(name: str) -> str:
    """Return a page about a judgement, and about the same again."""
    found = list(pages())[NAMES.index(name)]
    return html.page([source(found), source(found)])


def browse(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the browser without a screen."""
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([CHROMIUM, *quiet, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_complained_of_or_asked_for(tmp_path: Path, name: str) -> None:
    """The console stays empty, where the browser says what it refuses to fetch: the page's policy allows nothing."""
    (tmp_path / "page.html").write_text(page(name), errors="backslashreplace")
    done = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", tmp_path / "page.html")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<h1>" in done.stdout


@pytest.mark.parametrize(
    "wrong", ["<img src='http://127.0.0.1/x.png'>", "<script>f()</script>", "<svg><image href='x'/></svg>"]
)
def test_the_browser_would_tell(tmp_path: Path, wrong: str) -> None:
    """The control: a page that wants to fetch something, or to run something, is heard."""
    (tmp_path / "page.html").write_text(page("nothing").replace("</body>", f"{wrong}</body>"))
    done = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", tmp_path / "page.html")
    assert "CONSOLE" in done.stderr
    assert "Content Security Policy" in done.stderr


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_everything_can_be_read(tmp_path: Path, name: str, dark: bool) -> None:
    """Nothing is wider than the window, text stands out, figures have words, and names are what they were."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{escape(page(name))}"></iframe>' for width in WIDTHS
    )
    head = "<!DOCTYPE html><meta charset=utf-8><style>iframe { border: 0 }</style>"
    outer = f"{head}<pre></pre>{frames}<script>{SCRIPT}</script>"
    (tmp_path / "outer.html").write_text(outer, errors="backslashreplace")
    done = browse(
        tmp_path,
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1400,1000",
        "--dump-dom",
        tmp_path / "outer.html",
    )
    told: list[dict[str, Any]] = json.loads(unescape(done.stdout.partition("<pre>")[2].partition("</pre>")[0]))
    assert len(told) == len(WIDTHS)
    for frame, width in zip(told, WIDTHS, strict=True):
        assert width - 20 < frame["room"] <= width, "a scroll bar takes some"
        assert frame["wide"] <= frame["room"], frame["wide"]
        assert frame["dark"] is dark
        assert frame["faintest"][0] >= 4.5, frame["faintest"]
        assert frame["alternatives"] == 0
        if name == "hostile":
            assert all(each in frame["text"] for each in HOSTILE[:3])


def test_a_page_is_printed_with_what_is_folded(tmp_path: Path) -> None:
    """On paper nobody unfolds anything."""
    (tmp_path / "page.html").write_text(page("everything"), errors="backslashreplace")
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", tmp_path / "page.html")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
