"""Reading what was checked against a type, from many threads."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest


@pytest.mark.parametrize("by", ["convert", "parse_json"])
def test_threads_that_meet_a_type_for_the_first_time_all_get_their_value(by):
    """As the first requests of a server do; msgspec alone ends the process with a segmentation fault in no time."""
    code = """
        import json, sys, threading
        from pathlib import Path
        import msgspec
        from ws.files.reading import convert, parse_json

        sys.setswitchinterval(1e-6)
        value = {"part": {"a": 1, "b": ["x"], "c": {}}, "more": []}

        def meet():
            together.wait()
            if sys.argv[1] == "convert":
                found.append(convert(value, whole))
            else:
                found.append(parse_json(json.dumps(value).encode(), Path("file"), whole, "make it again"))

        for number in range(200):
            part = msgspec.defstruct(f"Part{number}", [("a", int), ("b", list[str]), ("c", dict[str, int])])
            whole = msgspec.defstruct(f"Whole{number}", [("part", part), ("more", list[part])])
            found, together = [], threading.Barrier(4)
            threads = [threading.Thread(target=meet) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [whole(part(1, ["x"], {}), [])] * 4
    """
    done = subprocess.run([sys.executable, "-c", dedent(code), by], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
