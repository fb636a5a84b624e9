"""The site as it is built, in a browser without a network: every page fits a wide and a narrow window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# For each page and width: how much wider than its window it is, and formulas that are not typeset.
MEASURE = """<body><script>
const measured = [];
const load = (frame, page) => new Promise((done) => { frame.onload = done; frame.src = page; });
(async () => {
  for (const width of [1400, 420]) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `border: 0; height: 900px; width: ${width}px`;
    document.body.append(frame);
    for (const page of PAGES) {
      await load(frame, page);
      const inside = frame.contentDocument;
      const bare = [...inside.querySelectorAll(".arithmatex")].filter((each) => !each.querySelector(".katex-html"));
      measured.push([page, width, inside.documentElement.scrollWidth - width, bare.length]);
    }
  }
  document.title = JSON.stringify(measured);
})();
</script></body>"""


def test_pages_name_the_version_and_their_neighbours(site: Path) -> None:
    page = (site / "which.html").read_text("utf-8")
    assert re.search(r"mada-optim \d+\.\d+\.\d+, Apache License 2\.0", page)
    assert 'href="install.html" class="md-footer__link md-footer__link--prev"' in page
    assert 'href="migrating.html" class="md-footer__link md-footer__link--next"' in page


def test_pages_link_to_their_source_where_the_project_has_an_address(site: Path) -> None:
    page = (site / "which.html").read_text("utf-8")
    assert 'href="https://example.org/mada-optim/edit/main/docs/which.md"' in page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', path.read_text("utf-8"))
        fetched += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="([^"]+)"', path.read_text("utf-8"))
        assert [address for address in fetched if "//" in address] == [], path.name


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_every_page_fits_its_window(site: Path, tmp_path: Path) -> None:
    pages = [str(path.relative_to(site)) for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    assert len(pages) > 40
    measure = site / "measure.html"
    measure.write_text(MEASURE.replace("PAGES", json.dumps(pages)), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1500,1000", "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [str(CHROMIUM), *options, "--virtual-time-budget=600000", "--dump-dom", measure.as_uri()]
    document = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", document)
    measured = json.loads(html.unescape(title))
    assert len(measured) == 2 * len(pages)
    assert [each for each in measured if each[2] > 0 or each[3] > 0] == []
