"""What others give to a job is data: configs run no code and read no environment, checkpoints are checked first."""

import json
import pickle
from pathlib import Path
from typing import Any

import jobs
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_settings import search

from loko import online
from loko.checkpoint import CheckpointError
from loko.config import ConfigError, validate
from ray_jobs.settings import SearchConfig, read


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {0}']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:subprocess.Popen [['touch', '{0}']]",
    ],
)
def test_a_config_cannot_name_python(tmp_path: Path, tag: str) -> None:
    trap = tmp_path / "executed"
    with pytest.raises(ConfigError, match="cannot be read"):
        read(SearchConfig, written(tmp_path, f"name: {tag.format(trap)}\n"), [])
    assert not trap.exists()


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "x-${oc.env:SECRET,none}", "${oc.decode:1}"])
@pytest.mark.parametrize("where", ["file", "override"])
def test_a_config_cannot_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, where: str
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    plain = search(results=text if where == "file" else None)
    overrides = [f"results={text}"] if where == "override" else []
    with pytest.raises(ConfigError, match=r"calls a resolver; a config refers to its own keys only") as caught:
        read(SearchConfig, written(tmp_path, yaml.safe_dump(plain)), overrides)
    assert "hunter2" not in str(caught.value)


def test_a_config_may_refer_to_itself(tmp_path: Path) -> None:
    plain = search(results="results/${name}-${experiment.seed}")
    assert (
        read(SearchConfig, written(tmp_path, yaml.safe_dump(plain)), ["experiment.seed=3"]).folder == "results/tiny-3"
    )


@pytest.mark.parametrize("name", ["torch.optim.SGD", "os.system", "loko.LoKO", "__import__"])
def test_an_optimizer_is_one_of_the_registry(name: str) -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        validate(SearchConfig, search(candidates={"one": {"optimizer": {"name": name}}}))


@pytest.fixture
def run(tmp_path: Path) -> online.Run:
    """A run at its first rung, and a checkpoint of it in tmp_path/checkpoint."""
    run = online.start(tiny.config(tiny.shards(tmp_path / "rows", 40)))
    next(online.advance(run))
    (tmp_path / "checkpoint").mkdir()
    online.save(run, tmp_path / "checkpoint")
    return run


def changed(folder: Path, change: Any) -> None:
    """Change the parameters of a checkpoint, and its hashes with them: as one from elsewhere, not a damaged one."""
    path = folder / "parameters.safetensors"
    tensors = load_file(path)
    change(tensors, next(iter(tensors)))
    save_file(tensors, path)
    rehash(folder)


def rehash(folder: Path) -> None:
    import hashlib

    manifest = json.loads((folder / "checkpoint.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.update({k: t[k][:-1].clone()}), "another model"),
        (lambda t, k: t.update({k: torch.full_like(t[k], torch.nan)}), "not finite"),
        (lambda t, k: t.update({k: torch.full_like(t[k], torch.inf)}), "not finite"),
        (lambda t, k: t.pop(k), "another model"),
        (lambda t, k: t.update({"more": torch.zeros(1)}), "another model"),
    ],
)
def test_a_checkpoint_from_elsewhere_is_checked_before_use(
    run: online.Run, tmp_path: Path, change: Any, words: str
) -> None:
    folder = tmp_path / "checkpoint"
    changed(folder, change)
    before = {name: p.detach().clone() for name, p in run.task.model.named_parameters()}
    with pytest.raises(CheckpointError, match=words):
        online.resume(run, folder)
    with pytest.raises(CheckpointError, match=words):
        online.trained_model(run.config, folder)
    for name, p in run.task.model.named_parameters():
        assert torch.equal(p, before[name]), name


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_the_state_of_a_checkpoint_cannot_run_code(run: online.Run, tmp_path: Path) -> None:
    folder, trap = tmp_path / "checkpoint", tmp_path / "executed"
    for content in (pickle.dumps(Trap(trap)), None):
        if content is None:
            torch.save({"learner": Trap(trap)}, folder / "state.pt")
        else:
            (folder / "state.pt").write_bytes(content)
        rehash(folder)
        with pytest.raises(CheckpointError):
            online.resume(run, folder)
        assert not trap.exists()


def test_nothing_here_listens_on_every_address() -> None:
    """No server of ours, and none that the README or a launcher file starts, is told to."""
    everywhere = ".".join("0" * 4)
    for path in (*jobs.ROOT.glob("ray_jobs/**/*.py"), *jobs.ROOT.glob("loko/**/*.py"), jobs.ROOT / "README.md",
                 jobs.ROOT / "cluster.yaml", jobs.ROOT / "Makefile"):  # fmt: skip
        assert everywhere not in path.read_text(), path
