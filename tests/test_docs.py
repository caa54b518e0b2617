"""The README and the pages say what exists: links, settings, presets, make targets."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import vllm_sparsekv
from vllm_sparsekv.settings import PRESETS, SETTING_NAMES

ROOT = Path(vllm_sparsekv.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402

FOLDER = ROOT / "docs" / "pages"
PAGES = [ROOT / "README.md", *sorted(FOLDER.glob("*.md"))]
SETTINGS = (FOLDER / "settings.md").read_text()
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as mkdocs and GitHub make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](page.md#one) [d](none.md) [e](https://x.y/z)\n")
    assert broken_links(page) == ["#two", "none.md"]


def test_every_page_is_in_the_menu_and_the_start_page_or_readme() -> None:
    menu = re.findall(r"^  - (\S+\.md)$", (ROOT / "docs" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == [page.name for page in PAGES[1:]]
    linked = set(LINK.findall((FOLDER / "index.md").read_text()))
    assert linked >= set(menu) - {"index.md"}


def first_cells(text: str) -> set[str]:
    """Names in code at the start of the rows of tables."""
    rows = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_settings_and_presets_are_explained_and_no_others() -> None:
    settings = SETTINGS.split("## Presets")[0]
    assert first_cells(settings) == set(SETTING_NAMES)
    presets = SETTINGS.split("## Presets")[1].split("## ")[0]
    assert first_cells(presets) == set(PRESETS)


def test_presets_are_described_as_they_are() -> None:
    for name, preset in PRESETS.items():
        stored = [
            preset[f"{kind}_dtype"]
            + (f", {sparsity:.0%} dropped".replace("%", " %") if sparsity else "")
            for kind in ("key", "value")
            for sparsity in [preset[f"{kind}_sparsity"]]
        ]
        window = f"{preset['window']}, {preset['window_dtype']}"
        assert re.search(
            rf"^\| `{name}`[^|]*\| {stored[0]} \| {stored[1]} \| {window} \|",
            SETTINGS,
            re.MULTILINE,
        )


def test_tables_of_benchmarks_are_what_the_results_say() -> None:
    pages = [page.read_text() for page in tables.PAGES]
    found = [name for page in pages for name in re.findall(r"<!-- table (\w+) -->", page)]
    assert found == list(tables.TABLES)
    assert sum(page.count("<!-- end -->") for page in pages) == len(tables.TABLES)
    assert [tables.fill(page) for page in pages] == pages, "python benchmarks/tables.py writes them"
    page = pages[1]
    for figure in ("192,760", "1.90 / 3.21 / 3.22 / 3.35", "1.13x"):
        assert page.count(figure) == 1 and tables.fill(page.replace(figure, "0")) == page


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) < 120


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"demo", "test", "docs", "bench-gpu"} <= named
    assert named - targets == set()


def test_files_of_the_repository_that_are_named_exist() -> None:
    """Paths in code, but for patterns and build outputs."""
    folders = "vllm_sparsekv|kernels|tests|benchmarks|examples|requirements|docs"
    path = re.compile(rf"`(?:python )?((?:{folders})/[\w./-]+)[ `]")
    named = {name for page in PAGES for name in path.findall(page.read_text())}
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
