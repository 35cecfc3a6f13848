"""What every command line here shares, without torch: one-line errors, the parser, the name of a flag, the device."""

import argparse
import sys
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Ends the program over a user's mistake: one `error:` line on standard error, exit status 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


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
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        fail(f"--device {name}: {str(e).splitlines()[0]}")
    return name
