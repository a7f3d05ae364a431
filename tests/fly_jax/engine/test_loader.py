from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from fly_jax.engine.loader import enable_compilation_cache


@pytest.fixture(autouse=True)
def cache_setting() -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_JAX_CACHE_DIR", str(tmp_path / "cache"))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "xla")
    assert list((tmp_path / "cache" / "xla").iterdir()) == []


@pytest.mark.parametrize("folder", ["{tmp}/file/cache", "/proc/none", "~no_such_user/cache"])
def test_a_cache_that_cannot_be_written_is_only_a_warning(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("FLY_JAX_CACHE_DIR", folder.format(tmp=tmp_path))
    with caplog.at_level(logging.WARNING):
        enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    assert "set FLY_JAX_CACHE_DIR to a writable folder" in caplog.text
