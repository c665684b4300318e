"""Compiles the C library into the package, and names what the wheel needs of a system."""

import platform
import shutil
import subprocess
from json import loads
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def newest_glibc(library: Path) -> tuple[int, ...]:
    """The newest version of glibc whose symbols the library asks for."""
    with library.open("rb") as file:
        sections = [s for s in ELFFile(file).iter_sections() if isinstance(s, GNUVerNeedSection)]
        names = [entry.name for section in sections for _, needed in section.iter_versions() for entry in needed]
    return max(tuple(map(int, name[6:].split("."))) for name in names if name.startswith("GLIBC_2"))


class Library(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        root, package = Path(self.root).parents[1], Path(self.root) / "pillion"
        command = [
            "cargo",
            "build",
            "--release",
            "--package",
            "pillion-c",
            "--message-format",
            "json-render-diagnostics",
        ]
        lines = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE).stdout.splitlines()
        files = [file for line in lines for file in loads(line).get("filenames", [])]
        library = Path(next(file for file in files if file.endswith("libpillion.so")))
        # Beside the old one first: a process may have that loaded.
        shutil.copyfile(library, package / "libpillion.so.new")
        (package / "libpillion.so.new").replace(package / "libpillion.so")
        # Programs in C can use the same copy.
        shutil.copyfile(root / "bindings" / "c" / "pillion.h", package / "pillion.h")
        major, minor = newest_glibc(library)[:2]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"
