"""The functions of `pillion._library` are those of `pillion.h`, with the same types."""

import ctypes
import re
from pathlib import Path

from pillion import _library

C_TYPES = {
    "pillion_tensor": _library.Tensor,
    "pillion_store": _library.Store,
    "pillion_observation": _library.Observation,
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
}
CLASSES = {
    name: getattr(_library, name.title()) for name in ("options", "message", "decision", "tensor", "observation")
}


def python_type(text: str) -> object:
    """The type in Python of an argument or a field in C."""
    text = re.sub(r"\bconst\b", "", text).strip()
    if "(*" in text:
        return "callback"
    if "*" not in text:
        return C_TYPES[text.split()[0]]
    return "text" if text.startswith("char") else "pointer"


def kind(type_: object) -> object:
    if type_ is ctypes.c_char_p:
        return "text"
    if isinstance(type_, type) and issubclass(type_, (ctypes.c_void_p, ctypes._Pointer)):
        return "pointer"
    if isinstance(type_, type) and issubclass(type_, ctypes._CFuncPtr):
        return "callback"
    return type_


def main() -> None:
    header = (Path(__file__).parents[2] / "c" / "pillion.h").read_text()
    header = re.sub(r"//.*", "", header)
    functions = dict()
    for result, name, arguments in re.findall(
        r"([\w ]+?[ *]+)pillion_(\w+)\(((?:[^()]|\([^()]*\)(?:\([^()]*\))?)*)\);", header
    ):
        # Commas of a callback's own arguments do not divide ours.
        flat = re.sub(r"\((\*[^()]*)\)\([^()]*\)", r"(\1)", arguments)
        functions[name] = (
            result.strip(),
            [text.strip() for text in flat.split(",") if text.strip() not in ("", "void")],
        )
    # The runtime is for trainers in C and C++.
    runtime = {name for name in functions if name.startswith(("engine_", "zero1_")) or name == "step"}
    different = functions.keys() - runtime ^ _library.ARGUMENTS.keys()
    assert not different, different
    for name, (result, arguments) in functions.items():
        if name in runtime:
            continue
        expected = [python_type(text) for text in arguments]
        assert [kind(type_) for type_ in _library.ARGUMENTS[name]] == expected, f"pillion_{name}: {arguments}"
        given = kind(_library.RESULTS.get(name, ctypes.c_int32))
        assert given == python_type(result), f"pillion_{name} gives {result}"
    for name, class_ in CLASSES.items():
        body = re.search(r"typedef struct (?:\w+ )?\{([^}]*)\} pillion_" + name + r"\b", header).group(1)
        fields = [text.strip() for text in body.split(";") if text.strip()]
        expected = [python_type(text) for text in fields]
        assert [kind(type_) for _, type_ in class_._fields_] == expected, f"pillion_{name}: {fields}"
    for name, value in re.findall(r"#define PILLION_(\w+) (\d+)", header):
        if name != "H":
            assert name.startswith("SHARD_") or getattr(_library, name) == int(value), f"PILLION_{name}"
    print(f"{len(functions)} functions: well")


if __name__ == "__main__":
    main()
