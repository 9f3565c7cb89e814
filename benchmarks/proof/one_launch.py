"""A few launches and no more, for tools that watch them: a split linear, or with `step` one step of D2-small."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

from fastprior.kernels.arguments import LinearArgs  # noqa: E402
from fastprior.kernels.gpu import linear  # noqa: E402


def main() -> None:
    device = torch.device("cuda")
    if "step" in sys.argv[1:]:
        import priors

        priors.fewer_layers()  # they are alike
        run, *_ = priors.step_of("D2-small", torch.bfloat16, device, compile=False)
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
    else:
        x, weight = (torch.randn(rows, 3072, device=device, dtype=torch.bfloat16) for rows in (3, 768))
        out, _ = linear.linear_fwd(LinearArgs(x, weight))
        exact = x.float() @ weight.float().t()
        assert (out.float() - exact).norm() <= 1e-2 * exact.norm()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
