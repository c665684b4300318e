"""The Python that runs PyTorch's side."""

import os
import pathlib
import subprocess
import sys


def python(given, packages):
    """`given`, if it has the packages; otherwise that of a virtual environment, made once, in $PILLION_PEERS or ~/.cache/pillion-peers."""
    imports = "import " + ", ".join(packages)
    if given:
        try:
            said = subprocess.run([given, "-c", imports], capture_output=True, text=True)
        except OSError as error:
            raise SystemExit(f"--python {given}: {error.strerror}")
        if said.returncode:
            raise SystemExit(f"--python {given} has not all of {', '.join(packages)}: {said.stderr.strip().splitlines()[-1]}")
        return given
    folder = pathlib.Path(os.environ.get("PILLION_PEERS", pathlib.Path.home() / ".cache" / "pillion-peers")) / "torch"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if subprocess.run([python, "-c", imports], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
