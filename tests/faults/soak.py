"""Many faults, over all backends, and a receipt of what came of them.

``python -m tests.faults.soak --faults 10000 --receipt docs/receipts/soak.md``. It ends with
status 1 when a promise was broken; what the processes then said is kept.
"""

from __future__ import annotations

import eventlet

eventlet.monkey_patch()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import pickle  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from datetime import UTC, datetime  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from random import SystemRandom  # noqa: E402

from eventlet.green.subprocess import STDOUT, Popen  # noqa: E402

from shared.testing.servers import find_program, find_rabbitmq  # noqa: E402
from tests.faults.account import Account  # noqa: E402
from tests.faults.driver import Run, run  # noqa: E402
from tests.faults.world import BACKENDS  # noqa: E402
from tests.support.processes import ROOT  # noqa: E402

FAULTS_A_RUN = 100
"""Each run has servers and a message log of its own: what is counted at its end stays small."""

READING = """\
Lost is what was stored and not handled, or handled and not noted. Put back is what a provider had
lost, whose server was wiped or killed, until an audit published it again. Booked by inbox are the
rows of a handler with an inbox: one for each of its events. Doubled runs are those that came again
after a fault, which is at least once. Taken over is from who was killed or frozen. Each broken
promise is listed below, with the seed that has it happen; where there is no list, there is none."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="altogether")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32))
    parser.add_argument("--backend", action="append", choices=list(BACKENDS))
    parser.add_argument("--receipt", type=Path, help="a file to write")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--run", nargs=4, metavar=("FOLDER", "BACKEND", "SEED", "FAULTS"))
    options = parser.parse_args()
    # so that what was started is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if options.run:
        folder, backend, seed, faults = options.run
        done = run(Path(folder), backend, int(seed), int(faults), partial(print, flush=True))
        Path(folder, "run").write_bytes(pickle.dumps(done))
        return 0
    backends = options.backend or list(BACKENDS)
    began, runs = datetime.now(UTC), []
    wanted = [
        (backend, options.seed + number, faults)
        for number, (backend, faults) in enumerate(shares(options.faults, backends))
    ]
    for done in eventlet.GreenPool(options.jobs).imap(lambda each: _one(*each), wanted):
        runs.append(done)
        if options.receipt:
            options.receipt.parent.mkdir(parents=True, exist_ok=True)
            options.receipt.write_text(receipt(runs, options, began))
    return 1 if any(each.account.wrong for each in runs) else 0


def shares(faults: int, backends: list[str]) -> list[tuple[str, int]]:
    """Return the runs that so many faults are, over the backends in turn."""
    found: list[tuple[str, int]] = []
    while faults > 0:
        count = min(faults, FAULTS_A_RUN)
        found.append((backends[len(found) % len(backends)], count))
        faults -= count
    return found


def _one(backend: str, seed: int, faults: int) -> Run:
    """Have a process do one run: it has signals and a clock that jumps to itself."""
    folder = Path(tempfile.mkdtemp(prefix="nameko-soak-"))
    print(f"{backend}: {faults} faults, seed {seed}", flush=True)
    module = [sys.executable, "-W", "ignore", "-m", "tests.faults.soak"]
    with (folder / "steps").open("wb") as steps:
        its = Popen(
            [*module, "--run", folder, backend, str(seed), str(faults)],
            cwd=ROOT,
            stdout=steps,
            stderr=STDOUT,
        )
    try:
        its.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            its.terminate()
        its.wait()
    if its.returncode == 0:
        done: Run = pickle.loads((folder / "run").read_bytes())  # noqa: S301 our own process wrote it
    else:
        said = (folder / "steps").read_text(errors="replace").strip().splitlines()
        wrong = [f"the run ended: {said[-1] if said else its.returncode}"]
        done = Run(backend, seed, account=Account(wrong=wrong))
    print(done, *done.account.wrong[:20], *done.tracebacks, sep="\n", flush=True)
    if done.account.wrong or done.tracebacks:
        print(f"what was said and written is in {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    return done


def receipt(runs: list[Run], options: argparse.Namespace, began: datetime) -> str:
    """Return what ran and what came of it, as Markdown."""
    seconds = (datetime.now(UTC) - began).total_seconds()
    done = sum(each.faults.total() for each in runs)
    command = f"make soak N={options.faults} SEED={options.seed} JOBS={options.jobs}"
    heads = ["Backend", "Faults", "Events stored", "By outbox", "Refused", "Rolled back"]
    heads += [
        "Uncertain",
        "Deliveries",
        "Lost",
        "Put back",
        "Booked by inbox",
        "Doubled runs",
        "Taken over",
        "Promises broken",
        "Slowest recovery",
    ]
    lines = [
        "# Faults, and what came of them",
        "",
        f"`{command}`, begun {began:%Y-%m-%d %H:%M} UTC: {done} faults in {seconds:.0f} s.",
        f"Commit {_said('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD')}. {_versions()}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for backend in dict.fromkeys(each.backend for each in runs):
        its = [each for each in runs if each.backend == backend]
        total = Account()
        for each in its:
            total.add(each.account)
        slowest = max(each.slowest_recovery for each in its)
        lines.append(
            f"| {backend} | {sum(each.faults.total() for each in its)} | {total.stored}"
            f" | {total.outboxed} | {total.raised} | {total.rolled_back} | {total.uncertain}"
            f" | {total.deliveries} | {total.lost} | {total.put_back} | {total.booked}"
            f" | {total.doubled} of {total.runs} | {total.takeovers} | {len(total.wrong)}"
            f" | {slowest:.1f} s |"
        )
    kinds = sum((each.faults for each in runs), Counter())
    lines += ["", "| Fault | Times |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(kinds.items())]
    lines += ["", READING]
    for each in runs:
        said = [*each.account.wrong, *each.tracebacks]
        if said:
            lines += ["", f"{each.backend}, seed {each.seed}:", ""]
            lines += [f"- {' '.join(line.split())[:300]}" for line in said[:20]]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    redis = _said(find_program("redis-server", "redis-server"), "--version").split("v=")[1]
    mariadb = _said(find_program("mariadbd", "mariadb-server"), "--version").split("Ver ")[1]
    rabbitmq = Path(find_rabbitmq("rabbitmq-server")).resolve().parent.parent.name
    return (
        f"Python {platform.python_version()}, Redis {redis.split()[0]},"
        f" MariaDB {mariadb.split()[0]}, {rabbitmq}, {platform.system()} on"
        f" {platform.machine()}."
    )


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
