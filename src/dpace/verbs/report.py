"""Write one HTML page from the folders that other verbs wrote."""

from dataclasses import dataclass
from pathlib import Path

from dpace.recipes.flags import first_as, parse


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, one page that needs no network, and the same as Markdown.

    Usage: dpace report FOLDER [FOLDER ...].
    """

    folders: tuple[str, ...]
    """Folders that demo, bench or compare wrote; given first, or with this flag."""
    output: str | None = None
    """HTML file to write; report.html in the first folder by default."""


def run(args: list[str]) -> None:
    """Run `dpace report`."""
    config = parse(ReportConfig, "report", first_as("folders", args))
    from dpace.report.page import write_report

    written = write_report(config.folders, config.output or Path(config.folders[0]) / "report.html")
    print("written:", ", ".join(map(str, written)))
