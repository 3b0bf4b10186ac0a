"""The conformance suite, run as somebody with a provider of their own runs it."""

import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

SECONDS = 300

COMMAND = "-m pytest tests/conformance -q -p no:cacheprovider --lab tests.thirdparty.lab:FileLab"


@pytest.mark.flow
def test_the_provider_passes():
    done = subprocess.run(
        [sys.executable, *COMMAND.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed
    # what it cannot is skipped, and that is little
    assert int(passed[1]) > 100
