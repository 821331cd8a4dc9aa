"""However large a tensor, the diff holds a small part of it at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.offline.ranks import write

ROOT = Path(__file__).parent.parent.parent
# VmHWM is the peak of what is resident, pages of mapped files among it, since this program began.
PROGRAM = """
import sys
from pathlib import Path
import torch
from parity.offline.diff import diff
from parity.offline.report import text

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

(torch.ones(9) @ torch.ones(9)).item()
floor = memory("VmRSS")
report = diff(Path(sys.argv[1]), Path(sys.argv[2]))
text(report)
assert [str(j.verdict.key) for j in report.wrong] == ["gradient of w"], report.wrong
assert report.wrong[0].hints == ["it is 3 times the baseline"], report.wrong[0].hints
print(memory("VmHWM") - floor)
"""


def test_the_peak_stays_below_three_times_the_largest_tensor(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4096, 4096, generator=generator)
    baseline = write(tmp_path / "a", {"w": value}, {"w": value}, has_state=False)
    for rank in range(4):
        part = {"w": value.chunk(4, dim=1)[rank].contiguous()}
        thrice = {"w": 3 * part["w"]}  # wrong, so that it is looked at more closely, too
        write(tmp_path / "b", part, thrice, rank, 4, has_state=False, at={"tp": rank})
    arguments = [sys.executable, "-c", PROGRAM, str(baseline), str(tmp_path / "b")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, largest = int(done.stdout), value.numel() * value.element_size()
    assert peak < 3 * largest, f"{peak / largest:.2f} times the largest tensor"
    # Measured: 107 MB, as for a tensor of 256 MB; 42 MB of it for a tensor of 16 KB.
    assert peak < 160 << 20, "what is held at a time has grown"
