"""show.py: what a terminal, a picture and a page show of tokens; the page in a browser, where there is one."""

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from conftest import make_model, tiny

import show
from show import Painter, Passage, make_visible, read_passage, routing_heatmap, write_page

TOKENS = [b"The ", b"<b>", b"\xe2\x82", b"\xac & \x1b[31m", "\u202eabc".encode(), b"\n", b"</script>{{N}}", b"\xff"]
DEPTH = [1, 2, 3, 0, 1, 2, 3, 1]
TEXT = "The <b>\u20ac & \u241b[31m\\u202eabc\n</script>{{N}}\ufffd"  # as a reader should see it


def some_passage(tokens=TOKENS, depth=DEPTH, prompt=2) -> Passage:
    surprise = [None] + [0.5 * t for t in range(1, len(tokens))]
    router = [[None, 0.25, 0.5][: d + 1] for d in depth]
    return Passage(list(tokens), list(depth), surprise, router, prompt)


class Reader(HTMLParser):
    """What the page says: token spans and their classes, cells of the big table, and anything that asks for a file."""

    def __init__(self, text: str):
        super().__init__()
        self.spans, self.rows, self.requests, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside.append(tag)
        self.requests += [attrs[k] for k in ("src", "href") if k in attrs]
        if tag == "span":
            self.spans.append([attrs.get("class", ""), ""])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside.append("/" + tag)

    def handle_data(self, data):
        if self.inside and self.inside[-1] == "span":
            self.spans[-1][1] += data
        elif self.inside and self.inside[-1] in ("td", "th"):
            self.rows[-1][-1] += data.rstrip("\n")


# ---- characters


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J", "\u241b[2J"),
        ("a\rb\x07", "a\u240db\u2407"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),  # a C1 control is an escape sequence in one character
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),  # these turn the line around
        ("x\u2028y", "x\\u2028y"),
        ("\ud83d", "\\ud83d"),  # half a character, which no file takes
        ("tab\tline\n\u00e9\U0001f600", "tab\tline\n\u00e9\U0001f600"),
    ],
)
def test_characters_that_would_be_obeyed_are_spelled(text, shown):
    assert make_visible(text) == shown
    make_visible(text).encode()


@pytest.mark.parametrize("terminal", [True, False])
def test_without_colour_only_a_terminal_is_protected(terminal, monkeypatch):
    class Enc:
        def decode_single_token_bytes(self, token):
            return "\x1b[31m\x9b\r".encode()

    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    Painter(Enc(), False, out, 1)(0, 5, 1)
    assert out.getvalue() == ("\u241b[31m\\x9b\u240d" if terminal else "\x1b[31m\x9b\r")


# ---- what is known of a token


@pytest.mark.parametrize("kind", [dict(), dict(n_recursion=3, router="expert"), dict(n_recursion=3, router="token")])
def test_a_passage_against_direct_computation(kind):
    class Enc:
        def decode_single_token_bytes(self, token):
            return b"%d " % token

    model, ids = make_model(tiny(**kind)).eval(), torch.arange(3, 25).tolist()
    p = read_passage(model, Enc(), ids, prompt=4)
    assert p.tokens[0] == b"3 " and p.prompt == 4 and p.surprise[0] is None
    with torch.no_grad():
        whole = model(torch.tensor([ids]), routing="causal")
    assert p.depth == whole.depth[0].tolist()
    for t in (1, 9, 21):  # each token from what is before it alone
        with torch.no_grad():
            here = model(torch.tensor([ids[:t]]), routing="causal").logits[0, -1].log_softmax(-1)
        assert p.surprise[t] == pytest.approx(-here[ids[t]].item(), abs=1e-4)
    for t, depth in enumerate(p.depth):
        if kind.get("router") == "expert":  # recursion 0 takes all; then one is asked after the other, until a no
            asked = [r for r, value in enumerate(p.router[t]) if value is not None]
            assert asked == [r for r in (1, 2) if r <= depth]
            assert all((p.router[t][r] >= 0.5) == (depth > r) for r in asked)
        elif kind:
            assert sum(p.router[t]) == pytest.approx(1, abs=1e-5)
            assert max(range(3), key=p.router[t].__getitem__) + 1 == depth
        else:
            assert p.router[t] == []


def test_loss_by_depth_is_that_of_the_next_token():
    rows = show.measure_depths([some_passage(), some_passage([b"a", b"b"], [2, 2])])
    assert [row["depth"] for row in rows] == [0, 1, 2, 3]
    assert [row["share"] for row in rows] == pytest.approx([0.1, 0.3, 0.4, 0.2])
    twos = [1.0, 3.0, 0.5]  # after tokens 1 and 5, and after the first of the second passage; nothing after its last
    assert rows[2]["nll"] == pytest.approx(sum(twos) / 3)


# ---- picture


def test_a_heat_map_takes_strings_or_bytes(tmp_path):
    for tokens in (["The", " $x_1$", "\n", "\U0001f600"], TOKENS):
        figure = routing_heatmap(tokens, DEPTH[: len(tokens)], file=str(tmp_path / "a.png"), columns=3)
        assert len(figure.axes) == -(-len(tokens) // 3)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    labels = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert labels == ["\\xac␣&␣\\u001b[31m"[:13] + "…", "\\u202eabc", "↵"]
    cells = figure.axes[0].collections[0].get_array()
    assert cells.tolist() == [[1, 1, 1], [0, 2, 2], [0, 0, 3]]


# ---- page


def test_the_page_shows_the_text_and_all_about_it(tmp_path):
    file = tmp_path / "page.html"
    write_page(file, [some_passage(), some_passage([b"x"], [2], 0)], 3, "my <run> {{N}}", "about & so")
    page = Reader(file.read_text())
    assert "".join(text for _, text in page.spans[:8]) == TEXT
    assert [kind.split()[0] for kind, _ in page.spans] == [f"d{d}" for d in [*DEPTH, 2]]
    assert [("given" in kind) for kind, _ in page.spans[:4]] == [True, True, False, False]
    assert "part" in page.spans[2][0] and "break" in page.spans[5][0]
    head = ["position", "token", "depth", "router 1", "router 2", "router 3", "surprise"]
    at = page.rows.index(head)
    assert page.rows[at + 1] == ["1", "The\u2423", "1", "", "0.250", "", ""]
    assert page.rows[at + 3] == ["3", "\\xe2\\x82", "3", "", "0.250", "0.500", "1.00"]
    assert len(page.rows[at + 1 :]) == 9
    assert "my &lt;run&gt; {{N}}" in file.read_text() and "about &amp; so" in file.read_text()


def test_the_loss_beside_the_text_may_be_that_of_more_text(tmp_path):
    rows = [dict(depth=1, share=0.625, nll=4.5), dict(depth=2, share=0.375, nll=3.25)]
    write_page(tmp_path / "a.html", [some_passage()], 3, "a", by_depth=rows)
    legend = Reader((tmp_path / "a.html").read_text()).rows[1:3]
    assert [row[1] for row in legend] == ["62.5%", "37.5%"]
    text = (tmp_path / "a.html").read_text()
    assert "4.50" in text and "3.25" in text and "prompt is underlined" in text
    write_page(tmp_path / "a.html", [some_passage(prompt=0)], 3, "a", by_depth=rows)
    assert "prompt is underlined" not in (tmp_path / "a.html").read_text()


def test_two_thousand_tokens_are_a_small_file_that_asks_for_nothing(tmp_path):
    tokens = [b" &<\xe2\x82\xac> %d" % t for t in range(2000)]
    write_page(tmp_path / "a.html", [some_passage(tokens, [t % 4 for t in range(2000)])], 3, "a")
    text = (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.html").stat().st_size < 1e6
    assert not Reader(text).requests and not re.search(r"url\(|@import|fetch\(|https?:", text)


def luminance(color: str) -> float:
    linear = []
    for byte in bytes.fromhex(color[1:]):
        x = byte / 255
        linear.append(x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("scale, ink", [(show.LIGHT, "#1f1b16"), (show.DARK, "#f1ece4")])
def test_text_is_readable_on_every_depth(n, scale, ink):
    """WCAG's contrast of at least 4.5 between text and background; and depths differ from one another."""
    assert ink in show.PAGE
    colors = [show.blend(scale, d, n) for d in range(1, n + 1)]
    assert len(set(colors)) == n and show.blend(scale, 0, n) == "transparent"
    for color in colors:
        bright, dark = sorted((luminance(color), luminance(ink)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


def browse(tmp_path, *flags) -> str:
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    done = subprocess.run([CHROMIUM, *options, *flags], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@browser
def test_a_browser_sets_the_text_and_tells_of_a_token(tmp_path):
    file = tmp_path / "page.html"
    write_page(file, [some_passage()], 3, "a run")
    dom = browse(tmp_path, "--dump-dom", f"file://{file}#3")
    page = Reader(dom)
    assert "".join(text for kind, text in page.spans if re.match(r"d\d", kind)) == TEXT
    tip = dom[dom.index('id="tip"') :]
    said = re.sub(r"<[^>]*>", "|", tip[: tip.index("<script")])
    assert re.findall(r"[^|>]+", said)[1:] == [
        "\\xe2\\x82", "depth", "3", "router 2", "0.250", "router 3", "0.500", "surprise", "1.00", "\n"
    ]  # fmt: skip
    assert "hidden" not in tip[: tip.index(">")]
    closed = browse(tmp_path, "--dump-dom", f"file://{file}")
    assert 'id="tip" role="status" hidden' in closed


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_paints_each_depth_by_day_and_by_night(dark, tmp_path):
    from matplotlib.image import imread

    file, picture = tmp_path / "page.html", tmp_path / "a.png"
    write_page(file, [some_passage([b"wide token "] * 9, [1, 2, 3] * 3, 0)], 3, "a run")
    night = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(tmp_path, *night, "--window-size=900,600", f"--screenshot={picture}", f"file://{file}")
    pixels = (imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    seen = {"#" + bytes(p).hex() for p in pixels.tolist()}
    for d in (1, 2, 3):
        assert show.blend(show.DARK if dark else show.LIGHT, d, 3) in seen
        assert show.blend(show.LIGHT if dark else show.DARK, d, 3) not in seen
