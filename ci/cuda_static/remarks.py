"""Why a proof or a mutant does not end as one would wish. The table of proofs repeats these lines.

Each row names kernels, launches or barriers, and the result that it explains. A result other than
`proved` or `flagged` without a row here is an error, and so is a row that explains nothing.
"""

import re

REMARKS: list[tuple[str, str, str, str]] = []


def remark_for(kernel: str, what: str, result: str, used: set[int]) -> str:
    for index, (kernels, names, expected, text) in enumerate(REMARKS):
        if expected == result and re.fullmatch(kernels, kernel) and re.fullmatch(names, what):
            used.add(index)
            return text
    return ""
