"""What is printed and logged moves no cursor, stays on its line, and fails nobody."""

import logging
import subprocess
import sys

from deradiff.terminal import PrintableRecord, say, warn

EVIL = "a\x1b[2J\nb.png"
HARMLESS = "a\\x1b[2J\\nb.png"


def test_a_strange_name_stays_on_its_line(capsys):
    say(f"see {EVIL}", "next", is_main=True)
    say("of another rank", is_main=False)
    warn(f"no {EVIL}")
    printed = capsys.readouterr()
    assert printed.out == f"see {HARMLESS}\nnext\n"
    assert printed.err == f"no {HARMLESS}\n"


def test_what_is_logged_is_printable_and_ours_has_one_line(caplog):
    former = logging.getLogRecordFactory()
    logging.setLogRecordFactory(PrintableRecord)
    try:
        logging.getLogger("deradiff.data.cache").warning("%s is torn", EVIL)
        logging.getLogger("others.table").warning("one\ntwo %s", "\x1b[2J")
    finally:
        logging.setLogRecordFactory(former)
    assert [record.getMessage() for record in caplog.records] == [
        f"{HARMLESS} is torn",
        "one\ntwo \\x1b[2J",
    ]


def test_work_goes_on_where_nobody_reads_what_it_says():
    code = "from deradiff.terminal import say\nfor _ in range(9): say('line')\nprint('x')\n1 / 0"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1
    assert "ZeroDivisionError" in error
    assert "BrokenPipe" not in error
