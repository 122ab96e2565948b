"""The Markdown of our own cards, as HTML."""

from __future__ import annotations

from geomed_mae.reporting.markdown import to_html


def test_headings_paragraphs_code_lists_and_tables_become_their_elements():
    text = (
        "---\na: 1\n---\n# One\nwords `x` and\n**more**\n\n    a < b\n    c\n\n"
        "- first\n  still\n- second\n\n|h|i|\n|---|---|\n|1|2|\n"
    )
    assert to_html(text).split("\n") == [
        "<h3>One</h3>",
        "<p>words <code>x</code> and <b>more</b></p>",
        "<pre>a &lt; b",
        "c</pre>",
        "<ul><li>first still</li><li>second</li></ul>",
        "<table><thead><tr><th>h</th><th>i</th></tr></thead><tbody>",
        "<tr><td>1</td><td>2</td></tr>",
        "</tbody></table>",
    ]


def test_everything_is_escaped():
    found = to_html("# <a>\n\n<script>\n\n- <b>\n\n|<i>|\n|---|\n|&|\n\n    <u>\n\n`<s>`")
    assert not [tag for tag in ("<a>", "<script>", "<b>", "<i>", "<u>", "<s>") if tag in found]


def test_odd_text_is_words():
    assert to_html("|no table|\n\n####### deep\n\n---") == "<p>|no table|</p>\n<p>####### deep</p>\n<p>---</p>"
    assert to_html("") == ""
