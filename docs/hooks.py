"""What mkdocs cannot do by itself: pages and files of the repository outside of docs/.

README, CONTRIBUTING and CHANGELOG are pages of the site too. All pages link as the repository is
laid out, so that the links also work in a checkout; here they become links within the site, and
the files they lead to (plots, scripts) become a part of it.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
OTHER_SERVER = re.compile(
    r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root of the repository."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links within the repository into links within the site."""
    folder = ROOT if page.file.src_uri in PAGES.values() else DOCS

    def within_the_site(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link["path"]))
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # a broken link, which mkdocs reports
        if target.is_dir():
            return link["text"]  # the site has no listings
        uri = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT).as_posix()
        uri = PAGES.get(uri, uri)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"[{link['text']}]({uri}{link['anchor'] or ''})"

    return LINK.sub(within_the_site, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raise a `PluginError` if a page loads anything from another server."""
    if found := OTHER_SERVER.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another server: {found[0]}")
    return output
