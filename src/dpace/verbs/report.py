"""Write one HTML page from measured folders."""

from dataclasses import dataclass
from pathlib import Path

from dpace.flags import first_as, parse


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, which needs no network, and report.md: dpace report FOLDER [FOLDER ...]."""

    folders: tuple[str, ...]
    """Folders that demo, bench or compare wrote; given first, or with this flag."""
    output: str | None = None
    """The HTML file; report.html in the first folder by default."""


def run(args: list[str]) -> None:
    """Write the page, and print where it is."""
    config = parse(ReportConfig, "report", first_as("folders", args))
    from dpace.report.page import write_report

    written = write_report(config.folders, config.output or Path(config.folders[0]) / "report.html")
    print("written:", ", ".join(map(str, written)))
