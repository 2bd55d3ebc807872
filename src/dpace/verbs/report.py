"""Write one HTML page from the folders that other verbs wrote."""

from pathlib import Path

from dpace.config import OneOrMore, Text, options
from dpace.recipes.flags import Arguments, Given


@options
class ReportConfig:
    """Write report.html, one page of tables and drawings that needs no network.

    The folders may stand first: dpace report FOLDER ANOTHER-FOLDER.
    """

    folders: OneOrMore[Text]
    """Folders with results, which other verbs wrote; given first, or with this flag.
    Where the answers that were trained on are there too, the page shows which of them are scored."""
    output: Text | None = None
    """HTML file to write; report.html in the first folder by default."""


ARGUMENTS = Arguments(ReportConfig, first="folders")


def run(config: ReportConfig, given: Given) -> None:
    """Run `dpace report`."""
    from dpace.report.page import write_report

    page = config.output or Path(config.folders[0]) / "report.html"
    write_report(config.folders, page)
    print("written:", page)
