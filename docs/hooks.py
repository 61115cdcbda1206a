"""MkDocs: the saved results of `lorakit bench` lie in benchmarks/, beside docs/; this brings them into the site.

A page links to them as they lie in the repository (`../benchmarks/cpu_decode.png`), so the link is true there too.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Adds the results and their plots to the site's files."""
    folder = Path(config.config_file_path).parent / "benchmarks"
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".png"):
            files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points the links to where the files lie in the site."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")
