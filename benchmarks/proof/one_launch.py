"""A few launches and no more, for tools that watch them: a split linear, or with `step` one step of D2-small."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import priors  # noqa: E402
import torch  # noqa: E402

from fastprior.kernels import linear  # noqa: E402


def main() -> None:
    device = torch.device("cuda")
    if "step" in sys.argv[1:]:
        run, *_ = priors.step_of("D2-small", torch.bfloat16, device, compile=False)
        run()
    else:
        x, weight = (torch.randn(rows, 3072, device=device, dtype=torch.bfloat16) for rows in (3, 768))
        out, _ = linear.linear_fwd(x, weight)
        error = (out.float() - x.float() @ weight.float().t()).norm() / out.float().norm()
        assert error < 1e-2, error
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
