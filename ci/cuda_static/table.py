"""Tables in plain text that are checked in, so that a change of a result is a change in a commit."""

from pathlib import Path


def render(comment: str, header: list[str], rows: list[list[str]]) -> str:
    """Aligns all columns but the last, which may hold a sentence."""
    cells = [["# " + header[0], *header[1:]], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    lines = [f"# {line}" for line in comment.strip().splitlines()]
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(lines) + "\n"


def compare(path: Path, text: str, update: bool, keys: int, only: bool) -> list[str]:
    """Compares a table with the checked-in file and prints both lines of each difference.

    The first `keys` columns identify a row. With `only`, rows of other kernels are not missed.
    """
    if update and not only:
        path.write_text(text)
        return []
    expected = rows_of(path.read_text() if path.exists() else "", keys)
    found = rows_of(text, keys)
    failures = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        if only and key not in found:
            continue
        if expected.get(key) != found.get(key):
            failures.append(
                f"{path.name}: {' '.join(key)}\n"
                f"    checked in: {expected.get(key, 'nothing')}\n"
                f"    found:      {found.get(key, 'nothing')}"
            )
    return failures


def rows_of(text: str, keys: int) -> dict[tuple[str, ...], str]:
    rows = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            cells = line.split()
            rows[tuple(cells[:keys])] = " ".join(cells[keys:])
    return rows
