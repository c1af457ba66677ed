"""A histogram as inline SVG."""

import html
from collections.abc import Mapping

BARS = 24
WIDTH, HEIGHT = 340, 190  # pixels
LEFT, BOTTOM, TOP, RIGHT = 8, 38, 18, 8
FILL = "#0072B2"  # Okabe and Ito's blue: told from black by every eye, dark enough in print


def binned(counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """[(first value, last value, rows)] of at most 24 bins of equal width, from the least value on.

    Example: `binned({1: 5, 3: 2})` is [(1, 1, 5), (2, 2, 0), (3, 3, 2)].
    """
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS)
    bins = [(start, min(start + width - 1, high), 0) for start in range(low, high + 1, width)]
    for value, rows in counts.items():
        i = (value - low) // width
        bins[i] = (bins[i][0], bins[i][1], bins[i][2] + rows)
    return bins


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The least value that at least `share` of the rows do not exceed."""
    needed, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    raise ValueError("no rows")


def histogram(counts: Mapping[int, int], title: str) -> str:
    """An SVG of how many rows have which length, with median, 95th percentile and greatest length.

    Args:
        counts: number of rows by length; not empty.
        title: for readers who hear the page.
    """
    bins = binned(counts)
    highest = max(rows for _, _, rows in bins)
    step = (WIDTH - LEFT - RIGHT) / len(bins)
    base, room = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    bars = []
    for i, (first, last, rows) in enumerate(bins):
        height = rows / highest * room
        what = f"{first}" if first == last else f"{first} to {last}"
        bars.append(
            f'<rect x="{LEFT + i * step + 0.5:.1f}" y="{base - height:.1f}"'
            f' width="{max(step - 1, 1):.1f}" height="{height:.1f}" fill="{FILL}">'
            f"<title>{what}: {rows} rows</title></rect>"
        )
    told = (
        f"median {quantile(counts, 0.5)}, 95 % up to {quantile(counts, 0.95)},"
        f" greatest {max(counts)}"
    )
    text = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#111"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" role="img" aria-label="{html.escape(title)}: {told}">'
        f"{''.join(bars)}"
        f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}" stroke="#111"/>'
        f'<text x="{LEFT}" y="12" {text}>tallest bar: {highest} rows</text>'
        f'<text x="{LEFT}" y="{base + 15}" {text}>{bins[0][0]}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{base + 15}" text-anchor="end" {text}>{bins[-1][1]}</text>'
        f'<text x="{LEFT}" y="{base + 31}" {text}>{told}</text>'
        "</svg>"
    )
