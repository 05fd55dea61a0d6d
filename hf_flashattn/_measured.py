"""Runs one compilation and writes down what it cost; ninja calls it for every unit (see build.py).

    python _measured.py REPORT COMMAND...

REPORT becomes JSON: returncode; cpu_seconds of the compiler and its children; peak_bytes, the
resident memory of the largest of them; output, all that they printed. `ptxas -v` prints much, so
the output goes to the terminal only when the compilation fails.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path


def main(report: Path, command: list[str]) -> int:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {
        "returncode": done.returncode,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
        "output": done.stdout,
    }
    report.write_text(json.dumps(facts, indent=1))
    if done.returncode:
        lines = done.stdout.splitlines(keepends=True)
        sys.stdout.write("".join(x for x in lines if not x.startswith("ptxas info")))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
