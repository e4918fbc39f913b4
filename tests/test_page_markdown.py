"""Markdown on the chat page, as Chromium builds it: what becomes of a text, and of a text that grows."""

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Page
from scripted import MARKDOWN, scripted_server

pytestmark = pytest.mark.slow

LINK = 'title="https://a.example/x" target="_blank" rel="noopener noreferrer nofollow"'
CASES = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "<b>&amp; 1 < 2": "<p>&lt;b&gt;&amp;amp; 1 &lt; 2</p>",
    "# One\n## Two ##\n####### no": "<h3>One</h3><h4>Two</h4><p>####### no</p>",
    "#no": "<p>#no</p>",
    "a\n# b": "<p>a</p><h3>b</h3>",
    "---\n***": "<hr><hr>",
    "*em* _em_ **strong** __strong__ ~~del~~": (
        "<p><em>em</em> <em>em</em> <strong>strong</strong> <strong>strong</strong> <del>del</del></p>"
    ),
    "***both*** **a *b* c**": "<p><em><strong>both</strong></em> <strong>a <em>b</em> c</strong></p>",
    "**not closed and *neither": "<p>**not closed and *neither</p>",
    "2 * 3 * 4, 2*3*4, 2**3**4, snake_case_name, ~one~": "<p>2 * 3 * 4, 2*3*4, 2**3**4, snake_case_name, ~one~</p>",
    "f(*args, **kwargs)": "<p>f(*args, **kwargs)</p>",
    r"\*a\* \[b\] \q": "<p>*a* [b] \\q</p>",
    "`a*b*` `` `x` `` `open": "<p><code>a*b*</code> <code>`x`</code> `open</p>",
    "[x *y*](https://a.example/x)": f'<p><a href="https://a.example/x" {LINK}>x <em>y</em></a></p>',
    "see https://a.example/x.": f'<p>see <a href="https://a.example/x" {LINK}>https://a.example/x</a>.</p>',
    "<https://a.example/x>": f'<p><a href="https://a.example/x" {LINK}>https://a.example/x</a></p>',
    "![alt](https://a.example/x)": f'<p><a href="https://a.example/x" {LINK}>alt</a></p>',
    "[a [b](https://a.example/x) c](x)": (f'<p>[a <a href="https://a.example/x" {LINK}>b</a> c](x)</p>'),
    "[no](relative) [no](javascript:x) [1] a[i]": "<p>[no](relative) [no](javascript:x) [1] a[i]</p>",
    "- a\n- b\n  - c\n\n    d\n- e": ("<ul><li>a</li><li>b<ul><li>c<p>d</p></li></ul></li><li>e</li></ul>"),
    "3. a\n4. b\n\n   c\n\nend": '<ol start="3"><li>a</li><li>b<p>c</p></li></ol><p>end</p>',
    "1. a\n- b": "<ol><li>a</li></ol><ul><li>b</li></ul>",
    "text\n- item\nlazy": "<p>text</p><ul><li>item<br>lazy</li></ul>",
    "in 1984. Yes\n7. no list": "<p>in 1984. Yes<br>7. no list</p>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "| a | b |\n|---|:-:|\n| `x` | y \\| z |\n| 1 |": (
        '<div class="table" tabindex="0"><table>'
        '<thead><tr><th scope="col">a</th><th class="middle" scope="col">b</th></tr></thead>'
        '<tbody><tr><td><code>x</code></td><td class="middle">y | z</td></tr>'
        '<tr><td>1</td><td class="middle"></td></tr></tbody></table></div>'
    ),
    "a | b\nno table": "<p>a | b<br>no table</p>",
    "": "",
}
BUILD = """async ([texts, isOpen]) => {
    const { MarkdownView } = await import('/ui/markdown.js');
    const root = document.createElement('div');
    const view = new MarkdownView(root);
    texts.forEach((text, i) => view.show(text, isOpen || i < texts.length - 1));
    return root.innerHTML;
}"""


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Page]:
    with scripted_server() as server:
        page = Page(browser, server.url)
        yield page
        page.context.close()
        assert page.complaints == []


def built(page: Page, *texts: str, is_open: bool = False) -> str:
    """The HTML of a view that is shown these texts one after the other; the last is all, unless `is_open`."""
    return str(page.at.evaluate(BUILD, [texts, is_open]))


@pytest.mark.parametrize("text", CASES)
def test_markdown_becomes(page: Page, text: str) -> None:
    assert built(page, text) == CASES[text]


def test_code_keeps_every_character(page: Page) -> None:
    code = "  a < b && *c*\n\n\n# no heading\n~~~\n    <b>\n"
    found = page.at.evaluate(
        """async (text) => {
            const { MarkdownView } = await import('/ui/markdown.js');
            const root = document.createElement('div');
            new MarkdownView(root).show(text, false);
            const figures = [...root.querySelectorAll('figure')];
            return figures.map((e) => [e.dataset.language, e.querySelector('code').textContent]);
        }""",
        f"````c++ title=x\n{code}```\n````\n\n- item\n  ```\n  inside\n  ```\n\n```<b>\nnever closed",
    )
    assert found == [["c++", f"{code}```"], ["", "inside"], ["", "never closed"]]


@pytest.mark.parametrize("text", [MARKDOWN, "\n\n".join(CASES)])
def test_a_text_that_grew_looks_like_one_that_came_at_once(page: Page, text: str) -> None:
    assert built(page, *(text[:end] for end in range(len(text) + 1))) == built(page, text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so **bo", "<p>so <strong>bo</strong></p>"),
        ("so **", "<p>so **</p>"),
        ("a `co", "<p>a <code>co</code></p>"),
        ("*a **b", "<p><em>a <strong>b</strong></em></p>"),
        ("[text](https://a.exa", "<p>text</p>"),
        ("**done**\n\n*open", "<p><strong>done</strong></p><p><em>open</em></p>"),
    ],
)
def test_what_has_begun_is_shown_as_what_it_will_be(page: Page, text: str, shown: str) -> None:
    assert built(page, text, is_open=True) == shown


def test_a_growing_text_leaves_finished_blocks_and_selections_alone(page: Page) -> None:
    found: Any = page.at.evaluate(
        """async (text) => {
            const { MarkdownView } = await import('/ui/markdown.js');
            const root = document.body.appendChild(document.createElement('div'));
            const view = new MarkdownView(root);
            let touched = 0;
            const watch = new MutationObserver((records) => {
                touched += records.filter((one) => root.firstChild.contains(one.target)).length;
            });
            view.show('First **block**\\n\\nSecond bl', true);
            const [first, second] = root.children;
            watch.observe(root, {subtree: true, childList: true, characterData: true});
            getSelection().setBaseAndExtent(second.firstChild, 0, second.firstChild, 6);
            view.show('First **block**\\n\\nSecond block\\nand **more', true);
            view.show('First **block**\\n\\nSecond block\\nand **more**\\n\\n' + text, false);
            await Promise.resolve();
            return [first === root.children[0], second === root.children[1], touched, getSelection().toString()];
        }""",
        MARKDOWN,
    )
    assert found == [True, True, 0, "Second"]


@pytest.mark.parametrize(
    "text",
    [
        "*" * 30_000,
        "*a " * 10_000,
        "**a*b" * 6_000,
        "_a*" * 10_000,
        "[" * 30_000,
        "[a](" * 8_000,
        "![[" * 10_000,
        "[](" + " " * 30_000,
        "".join("`" * n + " " for n in range(1, 240)),
        "` " * 15_000,
        "> " * 15_000,
        "- " * 15_000,
        "\n".join(" " * i + "- a" for i in range(240)),
        "- a" + "\n" * 30_000 + "b",
        "|" * 30_000,
        "|a\n" * 10_000,
        "a|b\n" + "-" * 30_000,
        "#" + " " * 30_000 + "x",
        "# " + " #" * 15_000,
        "```" + " " * 30_000 + "`",
        "https://a." + ")" * 30_000 + "x",
        "http" * 8_000,
        "<http:" * 6_000,
        "\\" * 30_000,
        "a\n" * 15_000,
        "~~~\n" * 8_000,
        "* * " * 8_000,
    ],
    ids=lambda text: text[:8].encode("unicode_escape").decode(),
)
def test_no_text_is_more_work_than_it_is_long(page: Page, text: str) -> None:
    """Shown ten times as it grows; what takes its length squared would take minutes."""
    steps = [text[: len(text) * i // 10] for i in range(1, 11)]
    assert built(page, *steps) is not None
