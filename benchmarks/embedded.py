"""How fast the default is: one dispatching and one consuming process on one SQLite file.

    .venv/bin/python -m benchmarks.embedded

Every event is stored before ``dispatch`` returns, delivered to a handler in the other
process, and its outcome stored; a rate counts from the first dispatch to the last stored
outcome. Exit status 1 when something falls short of its goal.
"""

import eventlet

eventlet.monkey_patch()

import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.bench import Bench, OwnBench, percentile, report  # noqa: E402


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        bench = OwnBench(Path(folder), {"QUEUE_PROVIDER": "embedded"})
        try:
            return measure(bench)
        finally:
            bench.close()


def measure(bench: Bench) -> int:
    bench.rate("many", 2000, 100)  # warm up
    met = []
    sent, whole = bench.rate("many", 10_000, 100)
    print(f"{'dispatch.many of 100, dispatching alone':44} {sent:9.1f} /s")
    met.append(report("dispatch.many of 100, end to end", whole, "/s", 2000, at_least=True))
    sent, whole = bench.rate("singly", 4000)
    print(f"{'single dispatches, dispatching alone':44} {sent:9.1f} /s")
    met.append(report("single dispatches, end to end", whole, "/s", 800, at_least=True))
    sent, whole = bench.rate("at_once", 10_000, 10)
    print(f"{'single dispatches of ten workers, dispatching':44} {sent:9.1f} /s")
    met.append(report("single dispatches of ten workers, end to end", whole, "/s", 800,
                      at_least=True))  # fmt: skip
    slow = bench.latencies(1000, 50)
    met.append(report("dispatch to handler at 50/s, median", statistics.median(slow), "ms", 5,
                      at_least=False))  # fmt: skip
    met.append(report("dispatch to handler at 50/s, p99", percentile(slow, 99), "ms", 20,
                      at_least=False))  # fmt: skip
    met.append(report("idle consumer, share of a core", bench.idle(5), "%", 1, at_least=False))
    met.append(report("peak memory of the consumer", bench.memory_megabytes(), "MB", 100,
                      at_least=False))  # fmt: skip
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
