import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from exl2jax.calibration import Tokenizer, load_tokenizer
from exl2jax.errors import ModelError

ROOT = Path(__file__).parents[2]


def test_encode_adds_only_what_is_asked_for(tokenizer: Tokenizer, tokenizer_dirs: dict[str, Path]) -> None:
    plain = Library.from_file(str(tokenizer_dirs["bos"] / "tokenizer.json")).encode("abc äé", add_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.encode("abc äé").tolist() == plain.ids
    assert tokenizer.encode("abc äé", bos=True, eos=True).tolist() == [0, *plain.ids, 1]
    assert tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode(tokenizer.encode("abc äé", bos=True)) == "<s>abc äé"


def test_default_template_only_on_request(template_tokenizer: Tokenizer) -> None:
    plain = template_tokenizer.encode("abc").tolist()
    assert plain[0] != 0
    assert template_tokenizer.encode("abc", template=True).tolist() == [0, *plain]


def test_model_without_bos(tokenizer_dirs: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_dirs["no-bos"])
    assert tokenizer.bos_id is None
    assert tokenizer.encode("abc", bos=True).tolist() == tokenizer.encode("abc").tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token_id": 7, "eos_token_id": [9, 8]}, (7, 9)),
        ({"text_config": {"bos_token_id": 5}}, (5, 1)),
        ({"bos_token_id": None}, (0, 1)),
    ],
)
def test_special_ids_come_from_the_config_first(
    tokenizer_dirs: dict[str, Path], tmp_path: Path, config: dict[str, object], expected: tuple[int, int]
) -> None:
    shutil.copytree(tokenizer_dirs["bos"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


def test_fingerprint_follows_the_files(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tokenizer_dirs["bos"], copy)
    first = load_tokenizer(copy).fingerprint
    assert first == load_tokenizer(tokenizer_dirs["bos"]).fingerprint
    (copy / "special_tokens_map.json").write_text("{}")
    assert load_tokenizer(copy).fingerprint != first


def test_stored_truncation_and_padding_are_switched_off(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    library = Library.from_file(str(tokenizer_dirs["bos"] / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a long text of many tokens"
    assert load_tokenizer(tmp_path).encode(text).tolist() == load_tokenizer(tokenizer_dirs["bos"]).encode(text).tolist()


def test_missing_and_damaged_tokenizers_are_named(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copy(tokenizer_dirs["bos"] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: holds list"):
        load_tokenizer(tmp_path)


def test_transformers_reads_what_has_no_tokenizer_json(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = json.loads((tokenizer_dirs["bos"] / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    # In a process of its own: importing transformers may warn, and warnings are errors here.
    code = (
        "import sys; from pathlib import Path; from exl2jax.calibration import load_tokenizer; "
        "t = load_tokenizer(Path(sys.argv[1])); print(t.bos_id, t.eos_id, t.encode('abc äé', bos=True).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    ids = load_tokenizer(tokenizer_dirs["bos"]).encode("abc äé", bos=True).tolist()
    assert done.stdout.strip() == f"0 1 {ids}"


def test_an_unreadable_slow_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    code = (
        "import sys; from pathlib import Path; from exl2jax.calibration import load_tokenizer\n"
        "from exl2jax.errors import ModelError\n"
        "try: load_tokenizer(Path(sys.argv[1]))\n"
        "except ModelError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert str(tmp_path) in done.stdout
    assert "tokenizer" in done.stdout
