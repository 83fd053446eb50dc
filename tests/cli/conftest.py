"""A pair of models with their delta, and command lines run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hubdiff.cli import run
from hubdiff.jobs.push import push_delta
from tests import models
from tests.cli.running import Family, Said


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    weights = models.weights()
    base = models.save(folder / "base", weights, shards=2)
    files = {"README.md": "# tuned\n", "pytorch_model.bin": "pickle"}
    tuned = models.save(folder / "tuned", models.moved(weights), shards=2, files=files)
    other = models.save(folder / "other", models.moved(weights, 1e-3, seed=7), shards=2)
    delta = folder / "delta"
    push_delta(tuned, delta, base=base)
    return Family(*map(str, (base, tuned, other, delta)))


@pytest.fixture
def hubdiff(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Said:
        capsys.readouterr()
        code = run(arguments)
        return Said(code, *capsys.readouterr())

    return call
