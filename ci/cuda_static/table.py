"""Tables in plain text. They are checked in, so each change of a result shows in a commit."""

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


def read(path: Path, keys: int) -> dict[tuple[str, ...], str]:
    return rows_of(path.read_text() if path.exists() else "", keys)


def compare(path: Path, text: str, keys: int, whole: bool) -> list[str]:
    """Compares a table with the checked-in file; each difference names both lines.

    The first `keys` columns identify a row. Unless the table is whole, rows may be missing from it.
    """
    expected = read(path, keys)
    found = rows_of(text, keys)
    if not expected:
        return [f"{path} has no rows: use --update"]
    failures = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        if not whole and key not in found:
            continue
        if expected.get(key) != found.get(key):
            failures.append(
                f"{path.name}: {' '.join(key)}\n"
                f"    checked in: {expected.get(key, 'nothing')}\n"
                f"    found:      {found.get(key, 'nothing')}"
            )
    return failures


def merge(path: Path, rows: list[list[str]], kernels: set[str], columns: int) -> list[list[str]]:
    """Adds the rows of a file for kernels that still exist and that `rows` says nothing about."""
    new = {row[0] for row in rows}
    for line in path.read_text().splitlines() if path.exists() else []:
        cells = line.split(None, columns - 1)
        if not line.startswith("#") and cells and cells[0] in kernels - new:
            rows = [*rows, cells + [""] * (columns - len(cells))]
    return sorted(rows, key=lambda row: row[0])


def rows_of(text: str, keys: int) -> dict[tuple[str, ...], str]:
    rows = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            cells = line.split()
            rows[tuple(cells[:keys])] = " ".join(cells[keys:])
    return rows
