"""Tables and quantities as text."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(size: float) -> str:
    """
    >>> format_bytes(1536), format_bytes(12), format_bytes(3 * 2**30)
    ('1.5 KiB', '12 B', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a header: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = [all(not row[i][:1].isdigit() for row in rows) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, words, strict=True)
        ).rstrip()

    return "\n".join([line(rows[0]), *map(line, rows[1:])])
