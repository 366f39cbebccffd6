"""MkDocs hook: fill directives in pages, add generated pages, and convert formulas to MathML when the site is built.

A directive is an HTML comment, which GitHub does not show: `<!-- docs: NAME ARGUMENTS -->` is replaced by the result of the
function NAME of `DIRECTIVES`. Neither the build nor the reader's browser fetches anything.
"""

import html
import posixpath
import re
import shlex
from pathlib import Path

import ops
import tiles
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from examples import page_of

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECTIVES = {
    "command": ops.command,
    "costs": ops.costs,
    "index": ops.index,
    "launches": ops.launches,
    "names": ops.names,
    "other_kernels": ops.other_kernels,
    "reference": ops.reference,
    "mask": tiles.mask,
    "tiles": tiles.tiles,
}
# Pages of the site that are files of the repository, by their path in the site.
COPIES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "results.md": "bench/RESULTS.md"}


def on_startup(command, dirty):
    """Link the packages for mkdocstrings, which otherwise reads the whole repository, with environments and tests.

    The links exist before mkdocstrings is configured, since it ignores a missing folder.
    """
    package = ROOT / "build" / "packages" / "tilewright"
    package.mkdir(parents=True, exist_ok=True)
    for source in (*ROOT.glob("*.py"), *ROOT.glob("*.pyi"), *(path.parent for path in ROOT.glob("*/__init__.py"))):
        link = package / source.name
        if not link.is_symlink():
            link.symlink_to(source)


def on_files(files, config):
    """Add the pages that are copies of files outside docs/, and one for each example."""
    for uri, source in COPIES.items():
        path = ROOT / source
        files.append(File.generated(config, uri, content=relinked(path.read_text(), source, uri)))
    for picture in sorted((ROOT / "bench" / "plots").glob("*.svg")):
        files.append(File.generated(config, f"plots/{picture.name}", content=picture.read_bytes()))
    for example in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{example.stem}.md", content=page_of(example.read_text(), example.name)))
    return files


def relinked(text: str, source: str, page: str) -> str:
    """Return the Markdown of the file `source` with its relative links as the site has them, seen from the page `page`.

    Files resolve relative links on GitHub. A link to a file that is not on the site becomes text.
    """
    pages = {ROOT / file: uri for uri, file in COPIES.items()}

    def replaced(match: re.Match) -> str:
        label, target = match[1], match[2]
        if re.match(r"https?:|#|plots/", target):
            return match[0]
        name, _, anchor = target.partition("#")
        path = ((ROOT / source).parent / name).resolve()
        if path in pages:
            uri = pages[path]
        elif path.is_relative_to(ROOT / "docs"):
            uri = path.relative_to(ROOT / "docs").as_posix()
        elif path.parent == ROOT / "examples":
            uri = f"examples/{path.stem}.md"
        else:
            return label
        uri = posixpath.relpath(uri, posixpath.dirname(page) or ".")
        return f"[{label}]({uri}{'#' + anchor if anchor else ''})"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", replaced, text)


def on_page_markdown(markdown, page, config, files):
    """Replace each directive by the result of its function, and links to files outside docs/ by links to their pages."""

    def filled(match: re.Match) -> str:
        name, *arguments = shlex.split(match[1])
        return DIRECTIVES[name](*arguments)

    if (ROOT / "docs" / page.file.src_uri).is_file():
        markdown = relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return re.sub(r"^<!-- docs: (.*?) -->$", filled, markdown, flags=re.MULTILINE)


def on_page_content(content, page, config, files):
    r"""Convert formulas, which `pymdownx.arithmatex` leaves as \(...\) and \[...\], to MathML."""

    def converted(match: re.Match) -> str:
        tag, text = match[1], html.unescape(match[2]).strip()
        formula = convert(text[2:-2].strip(), display="block" if text.startswith("\\[") else "inline")
        return f'<{tag} class="formula">{formula}</{tag}>'

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', converted, content, flags=re.DOTALL)
