"""Export a quantized model, compile it ahead of time, and run the package in a process that does not import `ao`.

python examples/export_aoti.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

import torch
from torch import nn

import ao

RUN = """
import sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(package(torch.load(sys.argv[2])), sys.argv[3])
assert "ao" not in sys.modules
"""


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()
    ao.quantize_(model, ao.Int4WeightOnlyConfig())
    x = torch.randn(3, 256)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        torch.save(x, f"{folder}/x")
        subprocess.run([sys.executable, "-c", RUN, package, f"{folder}/x", f"{folder}/y"], check=True)
        print("largest difference", (torch.load(f"{folder}/y") - model(x)).abs().max().item())


if __name__ == "__main__":
    main()
