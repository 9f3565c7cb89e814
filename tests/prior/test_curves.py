"""The picture of a run: small panels, units, and each line named where it ends, whatever was logged."""

import numpy as np
import pytest

from fastprior.prior import curves
from fastprior.prior.curves import plot_curves

Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw records, and look at what is to become a file."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: figures.append(self) or file.write_bytes(b"PNG"))

    def draw(records):
        plot_curves(records, tmp_path / "curves.png")
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        return {axes.get_title("left"): axes for axes in figures[-1].axes}, figures[-1]

    return draw


def names(axes):
    """What is written beside the lines, from the highest to the lowest."""
    return [text.get_text() for text in sorted(axes.texts, key=lambda text: -text.xy[1])]


SIMILARITIES = {
    "baseline similarity": 0.3, "similarity with original image": 0.7, "similarity with text": 0.31,
    "difference from baseline similarity": 0.01, "similarity with unrelated caption": 0.1,
}  # fmt: skip


def measured(split, step, steps=(16, 64)):
    found = {f"{split}/online l2-loss": 0.12, f"{split}/ema l2-loss": 0.1, "step": step}
    for n in steps:
        values = SIMILARITIES | {"median rank": 30.0 * step / 300, "recall@1": 0.25, "recall@5": 0.5}
        found |= {f"{split}/ema {name} [steps={n}]": value * n / 64 for name, value in values.items()}
    return found


RUN = [
    *({"training/l2-loss": 1 / step, "lr": 1e-4, "samples_per_second": 2e4, "step": step} for step in range(1, 300)),
    *(measured("validation", step) for step in (30, 150, 300)), measured("test", 300),
]  # fmt: skip


def test_a_run(drawn):
    panels, figure = drawn(RUN)
    assert [*panels] == ["loss", "similarity", "recall", "median rank", "learning rate", "speed"]
    assert names(panels["loss"]) == ["validation, online", "validation, average", "training"]
    assert names(panels["similarity"]) == ["with original image", "with text", "baseline", "with unrelated caption"]
    assert names(panels["recall"]) == ["recall@5", "recall@1"]
    assert not any(names(panels[title]) for title in ("median rank", "learning rate", "speed"))
    units = [axes.get_ylabel() for axes in panels.values()]
    assert units == ["mean squared error", "cosine", "% of pairs", "1 is best", "", "samples per second"]
    assert panels["recall"].lines[-1].get_ydata()[-1] == 50
    assert panels["similarity"].get_title("right") == "solid: 64 sampling steps, dashed: 16; \N{WHITE DIAMOND} test"
    assert [panels[title].get_yscale() for title in ("loss", "median rank", "similarity")] == ["log", "log", "linear"]
    assert "300 steps" in figure.get_suptitle()
    for axes in figure.axes:
        assert axes.get_legend() is None
        heights = sorted(text.xy[1] for text in axes.texts)
        assert all(np.diff(heights) >= curves.LABEL_GAP - 1e-4) and all(0 <= height <= 1 for height in heights)
        colors = [text.get_color() for text in axes.texts]
        assert len(set(colors)) == len(colors) and set(colors) <= {line.get_color() for line in axes.lines}


@pytest.mark.slow
def test_the_file(tmp_path, monkeypatch):
    """Everything is within the picture, and no name on another's or on a panel."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    plot_curves(RUN, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    whole = figure.bbox.padded(1)
    panels = [axes.get_window_extent() for axes in figure.axes]
    texts = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    for index, box in enumerate(texts):
        assert whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in (*panels, *texts[index + 1 :]))


def test_names_of_dalle2_pytorch(drawn):
    logged = {f"metrics/ema-validation/{name} [steps=64]": value for name, value in SIMILARITIES.items()}
    records = [
        *({"tracking/training-l2": 1 / step, "tracking/samples-sec": 9.0, "step": step} for step in range(1, 9)),
        {"metrics/online-validation/l2-loss": 0.3, "metrics/ema-validation/l2-loss": 0.2, **logged, "step": 9},
        {"metrics/ema-test/l2-loss": 0.25, "step": 9},
        {"error": "the disk is full", "step": 9}, {"tracking/epoch": 3, "step": None},
    ]  # fmt: skip
    panels, _ = drawn(records)
    assert [*panels] == ["loss", "similarity", "speed"]
    assert names(panels["loss"]) == ["validation, online", "validation, average", "training"]
    assert names(panels["similarity"]) == ["with original image", "with text", "baseline", "with unrelated caption"]
    assert panels["loss"].get_title("right") == "\N{WHITE DIAMOND} test"


@pytest.mark.parametrize("records, panels", [
    ([], []), ([{"error": "full", "step": 1}], []), ([{"l2-loss": None, "step": 1}], ["loss"]),
    ([{"l1-loss": float("inf"), "lr": 1e-4, "step": 1}], ["loss", "learning rate"]),
    ([{"test/ema recall@1 [steps=8]": 0.5, "step": 3}], ["recall"]),
], ids=["nothing", "no numbers", "a gap", "one step", "a test"])  # fmt: skip
def test_little_was_logged(drawn, records, panels):
    found, figure = drawn(records)
    assert [*found] == panels and ("nothing was logged" in figure.get_suptitle()) == (not panels)


def test_a_gap_is_a_gap_and_a_step_that_was_run_again_counts_once(drawn):
    records = [{"l2-loss": loss, "step": step} for step, loss in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0), (3, None))]
    (line,) = drawn(records)[0]["loss"].lines
    np.testing.assert_array_equal(line.get_xydata(), [(1, 5.0), (2, 3.0), (3, np.nan)])


def test_a_noisy_loss_is_smoothed(drawn):
    noise = np.random.default_rng(0).standard_cauchy(30_000)
    records = [{"training/l2-loss": 5 + value, "step": step} for step, value in enumerate(noise)]
    raw, smooth = drawn(records)[0]["loss"].lines
    assert len(raw.get_xdata()) == 30_000 and len(smooth.get_xdata()) == curves.SMOOTHED_TO
    assert abs(smooth.get_ydata() - 5).max() < 0.5 < abs(raw.get_ydata() - 5).max()


def test_names_keep_their_distance_and_order():
    heights = np.array([0.99, 0.5, 0.995, 0.51, 0.0])
    places = curves._spread(heights, 0.1)
    assert (np.argsort(places) == np.argsort(heights)).all()
    assert np.diff(np.sort(places)).min() >= 0.1 - 1e-6 and 0 <= places.min() and places.max() <= 1
    np.testing.assert_array_equal(curves._spread(np.array([0.2, 0.9]), 0.1), [0.2, 0.9])
    assert np.diff(curves._spread(np.full(30, 0.5), 0.1)).min() > 0  # more than there is room for


def test_curves_are_written_whole_or_not(tmp_path, monkeypatch):
    def fail(self, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("full")

    (tmp_path / "curves.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="full"):
        plot_curves(RUN, tmp_path / "curves.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("curves.png", b"old")]
