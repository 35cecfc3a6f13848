"""How the depth of tokens is shown: colours on a terminal, and a picture."""

import codecs

SHADES = (253, 153, 157, 222, 210, 177)  # xterm-256 backgrounds of depth 0, 1, 2, ...; the last serves all deeper ones


class Painter:
    """Writes the tokens of several rows to `out`, one row after the other although they arrive together. A character
    whose bytes are spread over tokens is written with its last byte, in the colour of that token."""

    def __init__(self, enc, color: bool, out, rows: int):
        self.enc, self.color, self.out, self.row = enc, color, out, 0
        self.waiting: list[list] = [[] for _ in range(rows)]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, row: int, token: int | None, depth: int | None) -> None:
        self.waiting[row].append((token, depth))
        while self.row < len(self.waiting) and self.waiting[self.row]:
            self.write(*self.waiting[self.row].pop(0))
        self.out.flush()

    def write(self, token: int | None, depth: int | None) -> None:
        if token is not None:
            text = self.decoder.decode(token_bytes(self.enc, token))
            self.out.write(paint(text, depth) if self.color else text)
            return
        self.row += 1
        more = self.row < len(self.waiting)
        self.out.write(self.decoder.decode(b"", final=True) + "\n" + "-" * 16 * more + "\n" * more)


def paint(text: str, depth: int) -> str:
    """Control characters as pictures, or a terminal would obey them; line breaks bare, or colour would fill lines."""
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    color = f"\x1b[30;48;5;{SHADES[min(depth, len(SHADES) - 1)]}m"
    return "\n".join(f"{color}{part}\x1b[0m" if part else "" for part in text.split("\n"))


def token_bytes(enc, token: int) -> bytes:
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:  # a model's vocabulary may be padded beyond the tokenizer's
        return "\N{REPLACEMENT CHARACTER}".encode()


def heatmap(tokens: list[bytes], depth: list[int], n: int, file: str, prompt: int = 0, columns: int = 32) -> None:
    """A PNG with the tokens along the axis, `columns` to a line, and above each as many of n cells filled as it took
    recursions. The first `prompt` tokens, which were given, are in grey."""
    from matplotlib import font_manager, ft2font
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono"))

    def label(token: bytes) -> str:
        text = token.decode("utf-8", "backslashreplace").translate({32: "␣", 10: "↵", 9: "⇥"})
        text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in text)
        return (text if len(text) <= 14 else text[:13] + "…").replace("$", r"\$")  # $ would begin a formula

    lines, wide = range(0, len(tokens), columns), min(columns, len(tokens))
    figure = Figure(figsize=(0.36 * wide + 0.8, len(lines) * (0.26 * n + 1.35)), layout="tight")
    colors = ListedColormap(["#f2f2f2"] + [(0.25, 0.45, 0.75, 0.35 + 0.65 * (r + 1) / n) for r in range(n)])
    for i, start in enumerate(lines):
        axis, here = figure.add_subplot(len(lines), 1, i + 1), range(start, min(start + columns, len(tokens)))
        cells = [[r + 1 if depth[t] > r else 0 for t in here] for r in range(n)]
        axis.pcolormesh(cells, cmap=colors, vmin=0, vmax=n, edgecolors="white", linewidth=1.5)
        axis.set(xlim=(0, wide), ylabel="recursion")
        axis.set_yticks([r + 0.5 for r in range(n)], range(1, n + 1))
        axis.set_xticks([t - start + 0.5 for t in here], [label(tokens[t]) for t in here], rotation=90, fontsize=9)
        for t, text in zip(here, axis.get_xticklabels(), strict=True):
            text.set(family="DejaVu Sans Mono", color="#888888" if t < prompt else "black")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=130)
