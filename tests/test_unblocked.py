"""Standard error that nobody reads, that is gone, or whose disk is full."""

from __future__ import annotations

import fcntl
import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from gqa_serve.unblocked import Unblocked, unblocked


def test_what_fits_is_written_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        stream = unblocked(file)
        assert isinstance(stream, Unblocked)
        stream.write("one\n")
        stream.write("zwei ü \ud800\n")
        stream.flush()
        stream.write("x" * 10_000)
    assert (tmp_path / "log").read_text("utf-8") == "one\nzwei ü \\ud800\n" + "x" * 10_000


def test_a_pipe_that_nobody_reads_is_not_waited_for_and_says_later_what_was_lost() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file, os.fdopen(read, "rb", 0) as reader:
        stream = Unblocked(file)
        for _ in range(5000):  # far more than a pipe holds
            stream.write("a line of a log that nobody reads\n")
        assert b"could not" not in reader.read(1 << 20)
        stream.write("again\n")
        text = reader.read(1 << 20).decode()
        assert text.lstrip("\n").startswith("(")
        assert text.endswith(" messages could not be written here)\nagain\n")
        stream.write("more\n")
        assert reader.read(1 << 20) == b"more\n"


def test_a_message_that_was_cut_does_not_run_into_the_next() -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(write, "w") as file, os.fdopen(read, "rb", 0) as reader:
        stream = Unblocked(file, lambda count: f"lost {count}")
        stream.write("x" * 3000 + "\n")
        stream.write("y" * 3000 + "\n")  # a part of it at most
        stream.write("z\n" * 3000)
        reader.read(1 << 20)
        stream.write("again\n")
        assert re.fullmatch("\nlost [123]\nagain\n", reader.read(1 << 20).decode())


def test_a_pipe_whose_reader_is_gone_is_written_to_in_vain() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        Unblocked(file).write("nobody hears\n")


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    code = (
        "import sys; from gqa_serve.unblocked import unblocked; s = unblocked(sys.stderr)\n"
        "for number in range(1000): s.write(f'line {number}\\n')\n"
        "print('alive')"
    )
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=log,
            check=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        )
    assert done.stdout == b"alive\n"
    assert (tmp_path / "log").stat().st_size <= 4096


def test_what_is_no_file_stays_what_it_is() -> None:
    stream = io.StringIO()
    assert unblocked(stream) is stream
