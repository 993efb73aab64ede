"""A table as text for people."""

from deradiff.evaluation.tables.table import Column, ResultTable


def test_what_means_something_to_latex_is_escaped():
    rows = [{"anchor": r"a_b\c{d}", "share": "50 % & #1 ~ ^ $x$"}]
    columns = [Column("anchor"), Column("share")]
    table = ResultTable.from_rows("mine", "A 5 % test", "Of a_b: {x}.", rows, columns)
    latex = table.latex()
    assert r"a\_b\textbackslash c\{d\}" in latex
    assert r"50 \% \& \#1 \textasciitilde \space \textasciicircum \space \$x\$" in latex
    assert r"\caption[A 5 \% test]{A 5 \% test. Of a\_b: \{x\}.}" in latex
    assert r"\label{tab:mine}" in latex and r"\toprule" in latex
