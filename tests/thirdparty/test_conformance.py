"""The conformance suite, run as somebody with a provider of their own runs it."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

SECONDS = 300

COMMAND = (
    "-m pytest -q -p shared.testing.conformance.plugin --lab tests.thirdparty.lab:FileLab "
    "--pyargs shared.testing.conformance"
)


@pytest.mark.flow
def test_the_provider_passes(tmp_path):
    """Given a project that has nothing but the suite installed, and the provider in its path."""
    done = subprocess.run(
        [sys.executable, *COMMAND.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed
    # what it cannot is skipped, and that is little
    assert int(passed[1]) > 70
