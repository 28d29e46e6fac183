"""Seconds until `mpi-mlx --help` has shown itself, and whether it imported mlx.

python benchmarks/startup.py [--repeats 10]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import common

COMMAND = [str(Path(sys.executable).with_name("mpi-mlx")), "--help"]
LOOK = "import sys\nfrom {module} import {name}\nsys.argv[1:] = ['--help']\ntry: {name}()\nexcept SystemExit: pass\n"
LOOK += "print(*(m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'mlx_vlm', 'numpy')), file=sys.stderr)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    rows = [{"seconds": s} for s in seconds[1:]]  # the first fills the file cache
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="mpi-mlx")
    module, name = entry.value.split(":")
    code = LOOK.format(module=module, name=name)
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr.split()
    median = common.median(rows)
    print(f"mpi-mlx --help: {median:.3f} s (wanted: under 0.4); imported of mlx and numpy: {seen or 'nothing'}")
    common.save("startup", {"seconds": median, "wanted": 0.4, "imported": seen, "results": {"mpi-mlx": rows}})


if __name__ == "__main__":
    main()
