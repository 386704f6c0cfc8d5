"""Models by hub id: from the hub's local cache, without the extra, and when nothing can be fetched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ferrum_rt import ModelError
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.types import ModelSource
from ferrum_rt.runtime.loading.loader import load_model, model_source
from tests.checkpoints import save_checkpoint, save_tokenizer

LOAD = """
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.runtime.loading.loader import load_model
for name in ("somebody/tiny", "somebody/absent"):
    try:
        print(load_model(build_config(name, None, {})).executor.model_info.type.value)
    except FerrumError as error:
        print(error.code)
"""


def test_what_a_source_is(tmp_path: Path) -> None:
    """A path that exists or looks like one is a directory, owner/name is a hub id, and nothing is the demo model."""
    (tmp_path / "owner").mkdir()
    assert model_source(str(tmp_path / "owner")) is ModelSource.DIRECTORY
    assert model_source("./owner/name") is ModelSource.DIRECTORY
    assert model_source("owner/name") is ModelSource.HUB
    assert model_source(None) is ModelSource.DEMO


@pytest.mark.slow
def test_a_hub_id_is_loaded_from_the_hubs_cache(tmp_path: Path) -> None:
    """With the extra installed an id is resolved by huggingface_hub; one that it cannot give is a ModelError."""
    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    save_checkpoint("llama", snapshot)
    save_tokenizer(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["llama", "model_error"]


def test_without_the_extra_a_hub_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the id and the extra."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"owner/name.*ferrum-rt\[hub\]"):
        load_model(build_config("owner/name", None, {}))
