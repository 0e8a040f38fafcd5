"""Each page of docs/tutorials/, as a reader would follow it: see harness/tutorial.py."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import images, tutorial
from harness.server import ASSETS, Server
from harness.tools import until, within

PAGES = [tutorial.read(path) for path in sorted(tutorial.PAGES.glob("*.md"))]
#: Set where everything must have been installed (scripts/test does): what is missing there is a failure.
REQUIRED = "CLAWPOT_TEST_REQUIRE_TOOLS" in os.environ


def _lacks(page: tutorial.Page) -> str:
    if tools := page.missing():
        return f"not installed: {', '.join(tools)}; scripts/test installs what it can"
    absent = [name for name in page.images if not (ASSETS / f"manifests/{name}.json").exists()]
    return f"not in the image store: {', '.join(absent)}" if absent else ""


@pytest.mark.timeout(within(max((page.seconds for page in PAGES), default=0)) + 60)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)
def test_a_page_does_what_it_says(page: tutorial.Page, make_server: Callable[..., Server], workdir: Path) -> None:
    if lacks := _lacks(page):
        assert not (REQUIRED and page.missing()), lacks
        pytest.skip(lacks)
    store = images.copy(ASSETS, workdir / f"{page.path.stem}-store")
    where = workdir / f"{page.path.stem}-page"
    server = make_server(page.path.stem[:12], image_dir=store).start()
    try:
        tutorial.run(page, server, where)
    finally:
        shutil.rmtree(where, ignore_errors=True)
    # `clawpot run --rm` waits for the end of its VM, but not for ever.
    until(lambda: not [vm for vm in server.cli.ls() if vm["desired"] == "deleted"], what="the end of what was deleted")
    left = [vm["name"] for vm in server.cli.ls()]
    assert not left, f"the page leaves VMs: {json.dumps(left)}"


def test_the_reader_of_pages_sees_what_differs(make_server: Callable[..., Server], workdir: Path) -> None:
    assert tutorial.matches("a … c\n", "a b c\n") and tutorial.matches("a\n…\nz\n", "a\nb\nc\nz\n")
    assert tutorial.matches("a\n…\n", "a\n") and not tutorial.matches("a\n", "a\nb\n")
    assert not tutorial.matches("a … c\n", "a b\n") and not tutorial.matches("a.c\n", "abc\n")
    path = workdir / "page.md"
    text = (
        "```bash\nx=1\necho $x\n```\n\n```text\n1\n```\n\n```console\nnot run\n```\n\n```bash\necho $x\nfalse\necho no\n```\n"
    )
    path.write_text(text)
    page = tutorial.read(path)
    assert [(step.line, step.shown) for step in page.steps] == [(2, "1\n"), (15, None)]
    server = make_server("page")
    for number, (wrong, word) in enumerate([(text, "ended with 1"), (text.replace("text\n1", "text\n2"), "the page shows")]):
        path.write_text(wrong)
        with pytest.raises(AssertionError, match=word):
            tutorial.run(tutorial.read(path), server, workdir / f"page-{number}")
