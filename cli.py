"""What every command line here shares, without torch: one-line errors, parsing, the device, the compiler."""

import argparse
import os
import shutil
import sys
import sysconfig
from decimal import Decimal
from pathlib import Path
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Ends the program over a user's mistake: one `error:` line on standard error, exit status 2."""
    print("error:", spell(" ".join(str(message).split()), sys.stderr), file=sys.stderr)
    sys.exit(2)


def spell(text: object, stream=None) -> str:
    """Returns text as a stream (standard output) can show it: names of files may hold what a terminal would obey, or
    what its character set lacks. These become backslash escapes; line breaks stay."""
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in str(text))
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def flag(name: str) -> str:
    """Returns the command-line spelling of a field: batch_tokens -> --batch-tokens."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def open_device(name: str | None) -> str:
    """Returns `name`, or for "auto" and None the best device there is; ends the program if it cannot be used."""
    import torch

    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # events, streams and graphs belong to the current device
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        fail(f"--device {name}: {str(e).splitlines()[0]}")
    return name


def whole(text: str) -> int:
    """Returns the whole number of 64 bits that `text` spells, as 1000, 1e3 or 1_000. Raises ArgumentTypeError."""
    try:
        value = Decimal(text)
        if -(2**63) <= value < 2**63 and value == value.to_integral_value():
            return int(value)
    except ArithmeticError:  # no number, or nan
        pass
    raise argparse.ArgumentTypeError(f"{text} must be a whole number of 64 bits (1000 or 1e3)")


def check_compiler() -> None:
    """Ends the program if torch.compile would find no C++ compiler, or no header of Python, to build with."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as Inductor looks for it
    if shutil.which(compiler) is None:
        fail(f"--compile needs the C++ compiler {compiler}: apt-get install g++ (and unset CXX), or use --no-compile")
    places = [sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")]
    if sys.platform == "linux" and not any(Path(place, "Python.h").exists() for place in places):
        fail(f"--compile needs Python.h in {places[0]}: apt-get install python3-dev, or use --no-compile")
