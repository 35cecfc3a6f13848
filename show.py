"""How the depth of tokens is shown: colours on a terminal, a heat map, and a page for the browser.

    routing_heatmap(["The", " parser", " reads"], depth=[1, 3, 2], file="depth.png")
    write_page("depth.html", [read_passage(model, enc, ids)], n=3, title="my run")

Shapes: T tokens of a text, N recursions.
"""

import codecs
import html
import re
from pathlib import Path
from typing import NamedTuple

LOGITS = 2**24  # numbers in the logits that stand at a time: 64 MB
SHADES = (253, 153, 157, 222, 210, 177)  # xterm-256 backgrounds of depth 0, 1, 2, ...; the last serves all deeper ones
# Controls that a terminal obeys (C0, DEL and C1), that turn or break a line of text, and lone halves of a character.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SPELLED = {32: "␣", 10: "↵", 9: "⇥"}  # white space, where a token stands alone

# ----------------------------------------------------------------------------------------------------------------------
# terminal


class Painter:
    """Writes the tokens of many rows to `out`, one row after the other although they arrive together.

    A character whose bytes are spread over tokens is written with its last byte, in the colour of that token.
    Bytes pass as they are into a file or a pipe; control characters never reach a terminal.
    """

    def __init__(self, enc, color: bool, out, rows: int):
        self.enc = enc
        self.color = color
        self.out = out
        self.rows = rows
        self.row = 0  # the row that is written
        self.waiting: dict[int, list] = {}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, row: int, token: int | None, depth: int | None) -> None:
        """Takes in a token of a row and its depth; (row, None, None) ends the row."""
        self.waiting.setdefault(row, []).append((token, depth))
        while self.waiting.get(self.row):
            self.write(*self.waiting[self.row].pop(0))
        self.out.flush()

    def write(self, token: int | None, depth: int | None) -> None:
        if token is None:
            self.row += 1
            rule = "-" * 16 + "\n" if self.row < self.rows else ""
            self.out.write(self.decoder.decode(b"", final=True) + "\n" + rule)
            return
        text = self.decoder.decode(token_bytes(self.enc, token))
        if self.color:
            text = paint(text, depth)
        elif self.out.isatty():
            text = make_visible(text)
        self.out.write(text)


def make_visible(text: str) -> str:
    """Returns the text with pictures or escapes for the characters that a terminal or a page would obey."""

    def spell(match: re.Match) -> str:
        code = ord(match[0])
        if code < 32:
            return chr(0x2400 + code)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return UNSAFE.sub(spell, text)


def paint(text: str, depth: int) -> str:
    """Returns the text on the background of its depth; line breaks stay bare, or colour would fill lines."""
    color = f"\x1b[30;48;5;{SHADES[min(depth, len(SHADES) - 1)]}m"
    lines = make_visible(text).split("\n")
    return "\n".join(f"{color}{line}\x1b[0m" if line else "" for line in lines)


def token_bytes(enc, token: int) -> bytes:
    """Returns the bytes of a token; those of "\N{REPLACEMENT CHARACTER}" for an id that the tokenizer lacks."""
    try:
        return enc.decode_single_token_bytes(token)
    except (KeyError, OverflowError):  # a model's vocabulary may be padded beyond the tokenizer's
        return "\N{REPLACEMENT CHARACTER}".encode()


# ----------------------------------------------------------------------------------------------------------------------
# heat map


def routing_heatmap(
    tokens: list, depth: list[int], n: int | None = None, file: str | None = None, prompt: int = 0, columns: int = 32
):
    """Returns a matplotlib figure of tokens (str or bytes) against recursions; `file` also gets it as a picture.

    Above each token as many of `n` cells (default: the deepest token's) are filled as it took recursions.
    The first `prompt` tokens, which were given, are in grey. A line has `columns` tokens.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    n = n or max(depth)
    lines = range(0, len(tokens), columns)
    width = min(columns, len(tokens))
    figure = Figure(figsize=(0.36 * width + 0.8, len(lines) * (0.26 * n + 1.35)), layout="tight")
    blues = [(0.25, 0.45, 0.75, 0.35 + 0.65 * (r + 1) / n) for r in range(n)]
    colors = ListedColormap(["#f2f2f2", *blues])
    label = make_labeller()
    for i, start in enumerate(lines):
        axis = figure.add_subplot(len(lines), 1, i + 1)
        here = range(start, min(start + columns, len(tokens)))
        cells = [[r + 1 if depth[t] > r else 0 for t in here] for r in range(n)]
        axis.pcolormesh(cells, cmap=colors, vmin=0, vmax=n, edgecolors="white", linewidth=1.5)

        # tokens below their cells, recursions on the left
        axis.set(xlim=(0, width), ylabel="recursion")
        axis.set_yticks([r + 0.5 for r in range(n)], range(1, n + 1))
        places = [t - start + 0.5 for t in here]
        axis.set_xticks(places, [label(tokens[t]) for t in here], rotation=90, fontsize=9)
        for t, text in zip(here, axis.get_xticklabels(), strict=True):
            text.set(family="DejaVu Sans Mono", color="#888888" if t < prompt else "black", parse_math=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    if file:
        figure.savefig(file, dpi=130)
    return figure


def make_labeller(size: int = 14):
    """Returns a function from a token to a label of at most `size` characters, all of which DejaVu Sans Mono has."""
    from matplotlib import font_manager, ft2font

    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono"))

    def label(token: str | bytes) -> str:
        if isinstance(token, bytes):
            token = token.decode("utf-8", "backslashreplace")
        text = ""
        for c in token.translate(SPELLED):
            text += c if c.isprintable() and font.get_char_index(ord(c)) else f"\\u{ord(c):04x}"
        return text if len(text) <= size else text[: size - 1] + "…"

    return label


# ----------------------------------------------------------------------------------------------------------------------
# page


class Passage(NamedTuple):
    """A text of T tokens, as a page shows it."""

    tokens: list[bytes]
    depth: list[int]
    surprise: list[float | None]  # nats, -log p of the token; None: nothing comes before it
    router: list[list[float | None]]  # [T][N] probabilities; None: the router was not asked
    prompt: int = 0  # the first tokens, which were given


def token_losses(model, hidden, targets):
    """Returns fp32 [M], the loss in nats of each of M targets, int64 [M], that the head predicts from hidden [M, D].

    Logits of all M at once would take gigabytes where the vocabulary is large."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = max(1, LOGITS // model.config.vocab_size)
    losses = []
    for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        losses.append(cross_entropy(model.head(h), target, reduction="none"))
    return torch.cat(losses)


def read_passage(model, enc, ids: list[int], prompt: int = 0, routing: str = "causal", **knobs) -> Passage:
    """Returns the passage of token ids, at most block_size of them; knobs are threshold and max_depth of a forward."""
    import torch

    c = model.config
    idx = torch.tensor([ids], device=model.wte.weight.device)
    with torch.no_grad():
        out = model(idx, routing=routing, return_logits=False, return_hidden=True, **knobs)
        surprise = token_losses(model, out.hidden[0, :-1], idx[0, 1:])
    depth = out.depth[0].tolist()

    # expert choice asks before each recursion that not all may run, until one says no; token choice chooses once
    router: list[list] = [[] for _ in ids]
    if c.router == "token":
        softmax = (c.router_func or "softmax") == "softmax"
        router = (out.router[0].softmax(-1) if softmax else out.router[0].sigmoid()).tolist()
    elif out.router is not None:
        for t, row in enumerate(out.router[0].sigmoid().tolist()):
            router[t] = [p if r <= depth[t] and c.capacities[r] < 1 else None for r, p in enumerate(row)]
    tokens = [token_bytes(enc, t) for t in ids]
    return Passage(tokens, depth, [None, *surprise.tolist()], router, prompt)


def write_page(
    file: str | Path, passages: list[Passage], n: int, title: str, about: str = "", by_depth: list[dict] | None = None
) -> None:
    """Writes texts as one HTML page that needs nothing else: background by depth, and of each token all we know.

    by_depth: dicts of depth, share and nll to stand in the legend; default: those of the passages themselves.
    Raises OSError.
    """
    by_depth = by_depth or measure_depths(passages)
    deepest = max(row["nll"] for row in by_depth)
    legend = []
    for row in by_depth:
        d = row["depth"]
        legend.append(
            f'<tr><th scope="row"><button class="d{d}" data-depth="{d}" aria-pressed="false">{d}</button></th>'
            f'<td>{row["share"]:.1%}</td><td class="loss"><i style="width:{row["nll"] / max(deepest, 1e-9):.0%}"></i>'
            f"<b>{row['nll']:.2f}</b></td></tr>"
        )
    flat = [d for passage in passages for d in passage.depth]
    values = dict(
        TITLE=html.escape(make_visible(title)),
        ABOUT=html.escape(make_visible(about)),
        COUNT=f"{len(flat):,}",
        MEAN=f"{sum(flat) / max(1, len(flat)):.2f}",
        N=str(n),
        GIVEN=" The prompt is underlined." if any(p.prompt for p in passages) else "",
        COLORS="\n".join(style_depth(d, n) for d in range(n + 1)),
        LEGEND="\n".join(legend),
        TEXTS="\n".join(set_text(passage) for passage in passages),
        ROWS="\n".join(tabulate(passages)),
        ROUTERS="".join(f'<th scope="col">router {r + 1}</th>' for r in range(count_routers(passages))),
    )
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], PAGE)
    Path(file).write_text(page, encoding="utf-8", errors="replace")


def measure_depths(passages: list[Passage]) -> list[dict]:
    """Returns, for each depth that occurs, its share of the tokens and the mean surprise of what comes after them."""
    losses: dict[int, list] = {}
    for p in passages:
        for depth, after in zip(p.depth, [*p.surprise[1:], None], strict=True):
            losses.setdefault(depth, []).append(after)
    total = sum(len(x) for x in losses.values())
    rows = []
    for depth in sorted(losses):
        known = [x for x in losses[depth] if x is not None]
        rows.append(dict(depth=depth, share=len(losses[depth]) / total, nll=sum(known) / max(1, len(known))))
    return rows


def count_routers(passages: list[Passage]) -> int:
    return max((len(row) for p in passages for row in p.router), default=0)


def style_depth(d: int, n: int) -> str:
    """Returns the CSS of depth d out of n: two colours by name, and what is left when another depth is picked out."""
    light = blend(LIGHT, d, n)
    dark = blend(DARK, d, n)
    rest = f'[data-only="{d}"] .text span:not(.d{d}) {{ background: none; opacity: .4 }}'
    return f".d{d} {{ --light: {light}; --dark: {dark} }}\n{rest}"


LIGHT = ("#f4efe6", "#ffe0a3", "#ffb46b", "#f98a63")  # from one recursion to all of them, under black text
DARK = ("#2a2622", "#57431c", "#8a5416", "#a94a22")  # under white text
NONE = "transparent"  # depth 0


def blend(scale: tuple[str, ...], d: int, n: int) -> str:
    """Returns the colour at depth d on a scale that reaches from depth 1 to depth n."""
    if d == 0:
        return NONE
    place = (d - 1) / max(1, n - 1) * (len(scale) - 1)
    i = min(int(place), len(scale) - 2)
    low = bytes.fromhex(scale[i][1:])
    high = bytes.fromhex(scale[i + 1][1:])
    mixed = [round(a + (b - a) * (place - i)) for a, b in zip(low, high, strict=True)]
    return "#" + bytes(mixed).hex()


def set_text(passage: Passage) -> str:
    """Returns the passage as HTML, a span a token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    spans = []
    for t, (token, depth) in enumerate(zip(passage.tokens, passage.depth, strict=True)):
        text = make_visible(decoder.decode(token, final=t == len(passage.tokens) - 1))
        kind = f"d{depth}"
        if t < passage.prompt:
            kind += " given"
        if "\n" in text:
            kind += " break"
        if not text:  # a part of a character, which is set with its last byte
            kind += " part"
        spans.append(f'<span class="{kind}">{html.escape(text, quote=False)}</span>')
    lines = b"".join(passage.tokens).split(b"\n")
    indented = sum(line.startswith((b"  ", b"\t")) for line in lines)
    font = "text code" if indented > len(lines) / 5 else "text"
    return f'<div class="{font}" dir="auto" tabindex="0">{"".join(spans)}</div>'


def tabulate(passages: list[Passage]) -> list[str]:
    """Returns the rows of the table of all tokens."""
    width = count_routers(passages)
    rows = []
    for passage in passages:
        for token, depth, surprise, router in zip(*passage[:4], strict=True):
            text = make_visible(token.decode("utf-8", "backslashreplace").translate(SPELLED))
            cells = ["" if p is None else f"{p:.3f}" for p in router]
            cells += [""] * (width - len(cells))
            cells.append("" if surprise is None else f"{surprise:.2f}")
            numbers = "".join(f"<td>{cell}" for cell in cells)  # the end tags of cells and rows may be left out
            rows.append(f"<tr><td>{len(rows) + 1}<td>{html.escape(text, quote=False)}<td>{depth}{numbers}")
    return rows


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{TITLE}}: recursions per token</title>
<style>
:root { color-scheme: light dark; --paper: #fffdf9; --ink: #1f1b16; --soft: #6d655a; --line: #e6ded1; --card: #faf6ee }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161412; --ink: #f1ece4; --soft: #a79d90; --line: #38332c; --card: #201d1a }
  [class*="d"] { --depth: var(--dark) }
}
@media (prefers-color-scheme: light) { [class*="d"] { --depth: var(--light) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2.2rem 1.6rem 3rem; display: grid; gap: 1.6rem 2.6rem;
  grid-template-columns: minmax(0, 1fr) 16.5rem }
header { grid-column: 1 / -1; border-bottom: 1px solid var(--line); padding-bottom: 1.1rem }
h1 { font-size: 1.55rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere }
header p { margin: 0; color: var(--soft) }
.text { font: 17px/1.95 ui-serif, Charter, Georgia, "Noto Serif", "DejaVu Serif", serif; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4; outline-offset: .6rem }
.text.code { font: 14.5px/1.85 ui-monospace, "Cascadia Code", Menlo, "DejaVu Sans Mono", monospace }
.text + .text { margin-top: 1.6rem; border-top: 1px solid var(--line); padding-top: 1.6rem }
.text span { background: var(--depth); padding: .2em 0; cursor: default;
  box-decoration-break: clone; -webkit-box-decoration-break: clone }
.text span.given { text-decoration: underline; text-decoration-color: var(--soft); text-underline-offset: .3em }
.text span.break::before { content: "\\21b5"; font-size: .75em; padding: 0 .15em }
.text span.part::before { content: "\\b7"; color: var(--soft) }
.text span:hover, .text span.on { outline: 2px solid var(--ink); outline-offset: -1px; border-radius: 3px }
{{COLORS}}
aside { position: sticky; top: 1.4rem; align-self: start; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1rem 1.1rem 1.1rem }
aside h2 { font-size: .95rem; margin: 0 0 .6rem }
aside table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
aside thead th { font-weight: 400; color: var(--soft); font-size: .8rem; text-align: left; padding: 0 0 .3rem }
aside td, aside tbody th { padding: .2rem .5rem .2rem 0; text-align: left }
button { font: inherit; font-weight: 600; color: inherit; background: var(--depth); border: 1px solid var(--line);
  border-radius: 6px; width: 2.2rem; height: 1.9rem; cursor: pointer }
button[aria-pressed="true"] { outline: 2px solid var(--ink) }
.loss { position: relative; width: 45% }
.loss i { display: block; height: 1.4rem; background: var(--line); border-radius: 4px }
.loss b { position: absolute; left: .5rem; top: 50%; transform: translateY(-50%); font-weight: 400 }
aside p { color: var(--soft); font-size: .82rem; line-height: 1.45; margin: .7rem 0 0 }
#tip { position: fixed; z-index: 2; min-width: 13rem; max-width: 20rem; background: var(--ink); color: var(--paper);
  border-radius: 8px; padding: .6rem .8rem; font-size: .85rem; box-shadow: 0 6px 24px rgb(0 0 0 / .28);
  pointer-events: none }
#tip[hidden] { display: none }
#tip b { display: block; font: 600 .95rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
  margin-bottom: .25rem }
#tip div { display: grid; grid-template-columns: 5.2rem 3.2rem 1fr; align-items: center;
  font-variant-numeric: tabular-nums }
#tip i { height: .45rem; border-radius: 3px; outline: 1px solid var(--soft);
  background: linear-gradient(90deg, #f08a4b var(--p), transparent var(--p)) }
details { grid-column: 1 / -1; border-top: 1px solid var(--line); padding-top: 1rem }
summary { cursor: pointer; color: var(--soft) }
details table { border-collapse: collapse; margin-top: .8rem; font-variant-numeric: tabular-nums }
details caption { text-align: left; color: var(--soft); padding-bottom: .5rem; max-width: 44rem }
details th, details td { text-align: right; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line) }
details th { font-weight: 600 }
details td:nth-child(2), details th:nth-child(2) { text-align: left; white-space: pre-wrap;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace }
@media (max-width: 50rem) { main { grid-template-columns: minmax(0, 1fr) } aside { position: static; grid-row: 2 } }
@media print { aside { position: static } #tip { display: none } * { print-color-adjust: exact } }
</style>
<main>
<header><h1>{{TITLE}}</h1><p>{{ABOUT}}</p></header>
<article aria-label="Text, coloured by recursions per token">
{{TEXTS}}
</article>
<aside>
<h2>Recursions per token</h2>
<table>
<thead><tr><th scope="col">depth<th scope="col">of tokens<th scope="col">loss, nats</thead>
<tbody>
{{LEGEND}}
</tbody>
</table>
<p>The colour of a token is how many of {{N}} recursions it took: {{MEAN}} on average in these {{COUNT}} tokens. The
loss is that of the token which comes next.{{GIVEN}}</p>
<p>Press a depth to see it alone. Point at a token, or walk with the arrow keys, to see with what probability the router
sent it on to each recursion, and how surprising it was itself.</p>
</aside>
<details>
<summary>All tokens as a table</summary>
<table id="tokens">
<caption>Depth: recursions that the token ran. Router: probability with which the recursion (for token choice, the
depth) was chosen, empty where it was not asked. Surprise: -log of the probability that the model gave to the token,
in nats.</caption>
<thead><tr><th scope="col">position<th scope="col">token<th scope="col">depth{{ROUTERS}}<th scope="col">surprise</thead>
<tbody>
{{ROWS}}
</tbody>
</table>
</details>
</main>
<div id="tip" role="status" hidden></div>
<script>
const spans = [...document.querySelectorAll(".text span")];
const rows = document.querySelector("#tokens tbody").rows;
const heads = [...document.querySelectorAll("#tokens thead th")].map(head => head.textContent);
const tip = document.getElementById("tip");
let current = -1;
spans.forEach((span, i) => { span.index = i; });

function show(i) {
  if (current >= 0) spans[current].classList.remove("on");
  current = i;
  tip.hidden = i < 0;
  if (i < 0) return;
  spans[i].classList.add("on");
  tip.replaceChildren();
  [...rows[i].cells].forEach((cell, column) => {
    const text = cell.textContent.trim();
    if (column === 0 || text === "") return;
    const line = document.createElement(column === 1 ? "b" : "div");
    if (column === 1) {
      line.textContent = text;
    } else {
      const [name, value] = [document.createElement("span"), document.createElement("span")];
      name.textContent = heads[column];
      value.textContent = text;
      line.append(name, value);
      if (heads[column].startsWith("router")) {
        const bar = document.createElement("i");
        bar.style.setProperty("--p", 100 * text + "%");
        line.append(bar);
      }
    }
    tip.append(line);
  });
  const box = spans[i].getClientRects()[0] || spans[i].getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - 8 - tip.offsetHeight)) + "px";
}

const article = document.querySelector("article");
article.addEventListener("pointerover", e => { if ("index" in e.target) show(e.target.index); });
article.addEventListener("pointerleave", () => show(-1));
document.addEventListener("keydown", e => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (e.key === "Escape") show(-1);
  if (!step || !document.activeElement.classList.contains("text")) return;
  e.preventDefault();
  show(Math.max(0, Math.min(spans.length - 1, current + step)));
  spans[current].scrollIntoView({ block: "nearest" });
});
document.querySelectorAll("button").forEach(button => button.addEventListener("click", () => {
  const pressed = button.getAttribute("aria-pressed") === "true";
  document.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", "false"));
  button.setAttribute("aria-pressed", !pressed);
  document.body.dataset.only = pressed ? "" : button.dataset.depth;
}));
// page.html#17 opens with token 17 picked out, as a link into the text
if (/^#[0-9]+$/.test(location.hash)) show(Math.min(spans.length, Math.max(1, +location.hash.slice(1))) - 1);
</script>
</html>
"""
