"""The documentation: generated pages agree with the code, links lead somewhere, and README leads to every page."""

import re
import shlex
from pathlib import Path

import pytest

from jobs import train
from jobs.cli import VERBS, build_parser
from jobs.common import commands_page

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read_links(page: Path) -> list[str]:
    """Targets of the Markdown links of a page that lead to files or headings of this repository."""
    return [link for link in LINK.findall(CODE.sub("`code`", page.read_text())) if not link.startswith("http")]


def read_anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and GitLab derive them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_commands_page_agrees_with_the_parsers():
    page = ROOT / "docs" / "commands.md"
    assert page.read_text() == commands_page.render_page(), "python -m jobs.common.commands_page > docs/commands.md"


def test_commands_page_has_every_verb_and_option():
    page = commands_page.render_page()
    assert all(f"## raylab {verb}\n" in page for verb in VERBS)
    assert r"| `--workers N\|MIN:MAX` |" in page and "### raylab cluster up\n" in page
    assert "SUPPRESS" not in page and "--here" not in page  # for nodes alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in read_links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in read_anchors(target), f"{page.name}: {link}"


def test_readme_links_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in read_links(ROOT / "README.md")}
    assert [page.name for page in PAGES if page.name != "README.md" and page not in linked] == []


def read_commands(page: Path) -> list[list[str]]:
    """Words of the commands in a page's blocks of shell that start a verb, also of those inside `cluster submit`;
    without forms such as `[--nodes 2]` and `...`, which stand for what the reader writes."""
    commands = []
    for body in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in body.replace("\\\n", " ").splitlines():
            for command in re.split(r"[|;>]|&&|\s--\s", line):
                found = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:raylab|python -m jobs\.)\s?(\w+.*)", command)
                if found and found[1].split()[0] in VERBS and "..." not in command and "[" not in command:
                    commands.append(shlex.split(found[1], comments=True))
    return commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_verbs_options_and_fields_that_exist(page):
    for verb, *words in read_commands(page):
        if (verb, words) in (("cluster", ["submit"]), ("cluster", ["run"])):  # its command follows
            continue
        args = build_parser(verb)[0].parse_args(words)
        if verb in ("train", "tune") and "--plugin" not in words:  # which brings fields of its own
            train.build_recipe(args.task, train.parse_settings(args), smoke=args.smoke)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        blocks = re.findall(r"```.*?```|`[^`\n]*`", page.read_text(), re.DOTALL)
        named = {name for block in blocks for name in re.findall(r"(?:^|`)make ([a-z-]+)", block, re.MULTILINE)}
        assert named <= targets, page.name


@pytest.mark.parametrize(
    ("text", "links", "anchors"),
    [
        ("# A *b*: `c`\n[x](y.md#z) [w](https://w)", ["y.md#z"], {"a-b-c"}),
        ("```\n# no\n[a](b)\n```\n`[a](b)`", [], set()),
        ("![picture](a.svg)", ["a.svg"], set()),
    ],
)
def test_reading_markdown(tmp_path, text, links, anchors):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert read_links(page) == links and read_anchors(page) == anchors
