"""loko.metrics against the same figures computed row by row in NumPy."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loko.metrics import OnlineMetrics, calibration_error, evaluate

CLASSES = 4


def log_softmax(row):
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def brute_categorical(logits, labels, window):
    """Every figure of a categorical run, one row at a time."""
    counts = np.ones(CLASSES)
    nll, hit, base_nll, base_hit = [], [], [], []
    for row, label in zip(logits, labels, strict=True):
        finite = np.isfinite(row).all()
        row = row if finite else np.zeros(CLASSES)
        nll.append(-log_softmax(row)[label])
        hit.append(finite and row.argmax() == label)
        base_nll.append(-math.log(counts[label] / counts.sum()))
        base_hit.append(counts.argmax() == label)
        counts[label] += 1
    return {
        "nll": np.mean(nll),
        "accuracy": np.mean(hit),
        "window_nll": np.mean(nll[-window:]),
        "window_accuracy": np.mean(hit[-window:]),
        "label_only_nll": np.mean(base_nll),
        "label_only_accuracy": np.mean(base_hit),
    }


def split(total, sizes):
    """Consecutive slices of the given sizes, then what is left."""
    start = 0
    for size in sizes:
        yield slice(start, min(start + size, total))
        start = min(start + size, total)
    yield slice(start, total)


def random_run(seed, rows, outputs=CLASSES):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, outputs)) * 3, generator.integers(0, CLASSES, rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    window=st.integers(1, 12),
    sizes=st.lists(st.integers(0, 15), max_size=6),
    broken=st.sets(st.integers(0, 39), max_size=3),
)
def test_categorical_is_the_row_by_row_figure_however_rows_are_batched(seed, rows, window, sizes, broken):
    logits, labels = random_run(seed, rows)
    broken = {row for row in broken if row < rows}
    for row in broken:
        logits[row, row % CLASSES] = [np.nan, np.inf, -np.inf][row % 3]
    metrics = OnlineMetrics(CLASSES, window=window)
    for part in split(rows, sizes):
        metrics.update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    result = metrics.result()
    assert result.pop("rows") == rows
    assert result.pop("nonfinite_rows") == len(broken)
    assert result == pytest.approx(brute_categorical(logits, labels, window), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 25), window=st.integers(1, 9), size=st.integers(1, 7))
def test_bernoulli_is_the_row_by_row_figure(seed, rows, window, size):
    logits, _ = random_run(seed, rows, 3)
    labels = np.random.default_rng(seed + 1).integers(0, 2, (rows, 3)).astype(np.float32)
    metrics = OnlineMetrics(3, "bernoulli", window=window)
    for part in split(rows, [size] * (rows // size)):
        metrics.update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    nll, hit, base_nll, base_hit = [], [], [], []
    ones = np.ones(3)
    for number, (row, label) in enumerate(zip(logits, labels, strict=True)):
        probability, base = 1 / (1 + np.exp(-row)), ones / (number + 2)
        nll.append(-np.log(np.where(label == 1, probability, 1 - probability)).sum())
        hit.append(((probability > 0.5) == (label == 1)).mean())
        base_nll.append(-np.log(np.where(label == 1, base, 1 - base)).sum())
        base_hit.append(((base > 0.5) == (label == 1)).mean())
        ones += label
    result = metrics.result()
    assert result["nll"] == pytest.approx(np.mean(nll), rel=1e-9)
    assert result["accuracy"] == pytest.approx(np.mean(hit))
    assert result["window_nll"] == pytest.approx(np.mean(nll[-window:]), rel=1e-9)
    assert result["label_only_nll"] == pytest.approx(np.mean(base_nll), rel=1e-9)
    assert result["label_only_accuracy"] == pytest.approx(np.mean(base_hit))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 25), window=st.integers(1, 9), size=st.integers(1, 7))
def test_gaussian_is_the_row_by_row_figure(seed, rows, window, size):
    outputs, _ = random_run(seed, rows, 2)
    labels = np.random.default_rng(seed + 1).normal(size=(rows, 2))
    metrics = OnlineMetrics(2, "gaussian", window=window)
    for part in split(rows, [size] * (rows // size)):
        metrics.update(torch.from_numpy(outputs[part]), torch.from_numpy(labels[part]))

    def score(predictions):
        variance_sum, nll, squares = np.ones(2), [], []
        for number, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
            error, variance = label - prediction, variance_sum / (number + 1)
            nll.append((0.5 * (error**2 / variance + np.log(2 * np.pi * variance))).sum())
            squares.append((error**2).mean())
            variance_sum = variance_sum + error**2
        return nll, squares

    nll, squares = score(outputs)
    base_nll, base_squares = score([labels[:row].sum(axis=0) / (row + 1) for row in range(rows)])
    result = metrics.result()
    assert result["nll"] == pytest.approx(np.mean(nll), rel=1e-9)
    assert result["mse"] == pytest.approx(np.mean(squares))
    assert result["window_mse"] == pytest.approx(np.mean(squares[-window:]))
    assert result["label_only_nll"] == pytest.approx(np.mean(base_nll), rel=1e-9)
    assert result["label_only_mse"] == pytest.approx(np.mean(base_squares))
    assert "accuracy" not in result


def labels_for(observation, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    if observation == "categorical":
        return torch.randint(0, CLASSES, (rows,), generator=generator)
    if observation == "bernoulli":
        return torch.randint(0, 2, (rows, CLASSES), generator=generator).float()
    return torch.randn(rows, CLASSES, generator=generator)


@pytest.mark.parametrize("observation", ["categorical", "bernoulli", "gaussian"])
def test_a_resumed_run_ends_with_the_same_bits(observation):
    logits, labels = (
        torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(3)),
        labels_for(observation, 64, 4),
    )
    logits[17, 0] = torch.nan
    batches = list(zip(logits.split(5), labels.split(5), strict=True))

    whole = OnlineMetrics(CLASSES, observation, window=20)
    first = OnlineMetrics(CLASSES, observation, window=20)
    for number, batch in enumerate(batches):
        for metrics in (whole, first) if number < 7 else (whole,):
            metrics.update(*batch)
            metrics.update_near_future(*batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = OnlineMetrics(CLASSES, observation, window=20)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.result() == first.result()
    for batch in batches[7:]:
        second.update(*batch)
        second.update_near_future(*batch)
    assert second.result() == whole.result()
    assert second.result()["nonfinite_rows"] == 1


def test_a_saved_state_does_not_follow_the_run():
    metrics = OnlineMetrics(CLASSES)
    metrics.update(torch.randn(3, CLASSES), torch.tensor([0, 1, 2]))
    state, before = metrics.state_dict(), metrics.result()
    metrics.update(torch.randn(3, CLASSES), torch.tensor([0, 1, 2]))
    metrics.load_state_dict(state)
    assert metrics.result() == before


def test_near_future_rows_leave_the_other_figures_alone():
    plain, ahead = OnlineMetrics(2, "gaussian"), OnlineMetrics(2, "gaussian")
    outputs, labels = torch.randn(9, 2), torch.randn(9, 2)
    for metrics in (plain, ahead):
        metrics.update(outputs, labels)
        if metrics is ahead:
            metrics.update_near_future(outputs + 5, labels)
        metrics.update(outputs, labels)
    result = ahead.result()
    assert result.pop("near_future_mse") > result["mse"]
    assert result.pop("near_future_nll") > 0
    assert result == plain.result()


def test_a_row_without_a_finite_output_counts_as_uniform_and_wrong():
    metrics = OnlineMetrics(CLASSES)
    metrics.update(torch.full((1, CLASSES), torch.nan), torch.tensor([0]))
    result = metrics.result()
    assert result["nll"] == pytest.approx(math.log(CLASSES))
    assert result["accuracy"] == 0
    assert result["nonfinite_rows"] == 1


def test_before_the_first_row_figures_are_nan_and_an_empty_batch_changes_nothing():
    metrics = OnlineMetrics(CLASSES)
    metrics.update(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long))
    result = metrics.result()
    assert result["rows"] == 0
    assert math.isnan(result["nll"])
    assert math.isnan(result["window_accuracy"])
    assert "near_future_nll" not in result


def test_bfloat16_outputs_are_scored_in_float64():
    logits = torch.randn(300, CLASSES).bfloat16()
    labels = torch.randint(0, CLASSES, (300,))
    metrics = OnlineMetrics(CLASSES)
    metrics.update(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert metrics.result()["nll"] == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 200))
def test_calibration_error_is_the_sum_over_bins(seed, rows):
    generator = np.random.default_rng(seed)
    confidence, correct = generator.uniform(0.01, 1, rows), generator.integers(0, 2, rows)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct)) == pytest.approx(expected)


def test_evaluate_categorical():
    logits, labels = random_run(5, 200)
    figures = evaluate(torch.from_numpy(logits), torch.from_numpy(labels))
    expected = brute_categorical(logits, labels, 1)
    assert figures["nll"] == pytest.approx(expected["nll"])
    assert figures["accuracy"] == pytest.approx(expected["accuracy"])
    assert 0 < figures["ece"] < 1
    assert (figures["rows"], figures["nonfinite_rows"]) == (200, 0)


def test_a_predictor_that_is_sure_and_right_is_calibrated():
    figures = evaluate(100 * torch.eye(CLASSES), torch.arange(CLASSES))
    assert figures["ece"] == pytest.approx(0)
    assert figures["accuracy"] == 1


def test_evaluate_gaussian_takes_the_variance_of_the_errors():
    outputs, labels = torch.zeros(4, 1), torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    figures = evaluate(outputs, labels, "gaussian")
    assert figures["mse"] == 2.5
    assert figures["nll"] == pytest.approx(0.5 * (math.log(2 * math.pi * 2.5) + 1))


def test_evaluate_of_no_rows_is_nan():
    figures = evaluate(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.long))
    assert figures["rows"] == 0
    assert math.isnan(figures["nll"])
    assert math.isnan(figures["ece"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineMetrics(0), "num_labels is 0"),
        (lambda: OnlineMetrics(2, window=0), "window is 0"),
        (lambda: OnlineMetrics(2, near_future=0), "near_future is 0"),
        (lambda: OnlineMetrics(2, "poisson"), "allowed are: categorical, bernoulli, gaussian"),
        (lambda: OnlineMetrics(2).update(torch.zeros(3, 4), torch.zeros(3)), r"expected \(3, 2\)"),
        (lambda: OnlineMetrics(2).load_state_dict(OnlineMetrics(3).state_dict()), "another task"),
        (lambda: OnlineMetrics(2).load_state_dict(OnlineMetrics(2, window=7).state_dict()), "saved with window 7"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
