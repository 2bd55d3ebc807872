"""Draw `docs/speed.svg`, and print its alternative text for `README.md`.

    python benchmarks/picture.py

It shows tokens a second over plain decoding, by kind of text: the table of the model card of `smollm2-135m`, which has
the command, the hardware and the versions that gave it.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARD = ROOT / "src" / "dpace" / "target" / "drafters" / "smollm2-135m" / "README.md"
PICTURE = ROOT / "docs" / "speed.svg"
ROW = re.compile(
    r"^\| (?P<kind>.+) \| [\d.]+ \| (?P<drafter>[\d.]+) (?P<interval>.+?) "
    r"\| (?P<copies>[\d.]+) (?P<copies_interval>.+?) \|",
    flags=re.MULTILINE,
)
"""Kind of text; speed with the drafter and with copies alone, each with its interval."""
FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 335" width="700" height="335" role="img">
  <style>
    text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 14px; fill: #1f2430 }
    .note { font-size: 13px; fill: #5b6475 }
    .drafter { fill: #2f6fd0 }
    .copies { fill: #b4bccb }
    line { stroke: #1f2430; stroke-dasharray: 5 4 }
  </style>
  <rect width="700" height="335" rx="10" fill="#ffffff"/>
  <text x="20" y="30">Tokens per second, over plain decoding</text>
  <rect class="drafter" x="330" y="19" width="14" height="12"/>
  <text class="note" x="350" y="30">with the drafter</text>
  <rect class="copies" x="470" y="19" width="14" height="12"/>
  <text class="note" x="490" y="30">copies of earlier text alone</text>
BARS
  <line x1="360" y1="44" x2="360" y2="318"/>
  <text class="note" x="366" y="322">1: plain decoding</text>
</svg>
"""
BARS = """\
  <g transform="translate(220 {top})">
    <text x="-200" y="24">{kind}</text>
    <rect class="drafter" y="0" width="{width:.0f}" height="17"/>
    <text class="note" x="8" y="13" dx="{width:.0f}">{drafter} {interval}</text>
    <rect class="copies" y="18" width="{copies_width:.0f}" height="17"/>
    <text class="note" x="8" y="31" dx="{copies_width:.0f}">{copies} {copies_interval}</text>
  </g>"""
PLAIN = 140
"""Pixels of the speed of plain decoding."""


def draw() -> tuple[str, str]:
    """Return the picture, and what it shows in words."""
    bars, words = [], []
    for number, found in enumerate(ROW.finditer(CARD.read_text())):
        row = found.groupdict()
        lengths = {"width": PLAIN * float(row["drafter"]), "copies_width": PLAIN * float(row["copies"])}
        bars.append(BARS.format(top=54 + 50 * number, **lengths, **row))
        words.append("{kind} {drafter}, copies alone {copies}".format(**row))
    text = f"Tokens per second with the drafter, over plain decoding: {'; '.join(words)}"
    return FRAME.replace("BARS", "\n".join(bars)), text


if __name__ == "__main__":
    picture, text = draw()
    PICTURE.write_text(picture)
    print(f"![{text}](docs/{PICTURE.name})")
