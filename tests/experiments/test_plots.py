"""`plot_curves`: what its lines say, read from the figure."""

import io
import json

import matplotlib
import pytest

import stepdistill_jax


def test_a_run_is_drawn_with_its_own_numbers(tmp_path):
    lines = [{"step": n, "loss/label": 1.0 * n, "loss/$why$": 2.0} for n in (1, 2, 3)]
    lines[2]["loss/label"] = None  # a step that was skipped
    lines.append({"step": 3, "eval/validation/loss/label": 0.5})
    lines[-1]["eval/validation/label_accuracy"] = 0.75
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    backend = matplotlib.get_backend()
    figure = stepdistill_jax.plot_curves(tmp_path)
    assert matplotlib.get_backend() == backend
    accuracy, loss = figure.axes
    assert [list(map(list, line.get_data())) for line in accuracy.lines] == [[[3], [0.75]]]
    drawn = {line.get_label(): list(map(list, line.get_data())) for line in loss.lines}
    assert drawn == {
        "label, train (mean of 20 steps)": [[1, 2], [1.0, pytest.approx(1.5)]],
        "label, validation": [[3], [0.5]],
        r"\$why\$, train (mean of 20 steps)": [[1, 2, 3], [2.0, 2.0, 2.0]],
    }
    figure.savefig(picture := io.BytesIO())
    assert picture.getvalue().startswith(b"\x89PNG")
