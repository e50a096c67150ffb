"""text.py: Llama-3's ids from every file format, and no text that turns into a special token."""

import importlib.util
import json
import pickle
import time

import pytest

from csm_fast.data import text
from csm_fast.data.text import TextTokenizer, load_text_tokenizer
from csm_fast.system import hub
from csm_fast.system.errors import InputError

TEXTS = [
    "Hello.",
    "",
    " leading and trailing ",
    "It's 12,345 o'clock -- isn't that 3.14159?  Two  spaces, CAPS, I'LL we'Ve",
    "Grüße aus Köln, ça va? ¿Qué tal? Šíleně žluťoučký kůň. Cafe\u0301",
    "Здравствуй, мир. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. سلام می\u200cروم",
    "こんにちは世界。你好，世界！ 안녕하세요 สวัสดีชาวโลก नमस्ते दुनिया வணக்கம்",
    "emoji 👩\u200d🚀🎉 and flags 🇵🇱, maths ∑∫√2 ≠ ½, \u00a0no-break\u3000wide",
    "a\nb\r\n\r\n  c\t\td   ",
    "<|end_of_text|> <|begin_of_text|><|eot_id|> <|reserved_special_token_5|> <|finetune_right_pad_id|>",
    "<|AUDIO|><|audio_eos|>",
    "[1] looks like a tag, [laughs] does not",
    "x" * 3000 + "1234567890" * 50,
]


def package_file():
    path = text._llama_models_file()
    if path is None:
        pytest.skip("llama-models is not installed")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    package_file()
    return load_text_tokenizer(package_file())


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """The package's vocabulary as a tokenizer.json such as the hub's: 256 special tokens and the Llama template."""
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    named = {0: "begin_of_text", 1: "end_of_text", 2: "AUDIO", 3: "audio_eos", 4: "finetune_right_pad_id", 9: "eot_id"}
    special = [f"<|{named.get(i, f'reserved_special_token_{i}')}|>" for i in range(256)]
    made = TikTokenConverter(package_file(), pattern=text._PATTERN).converted()
    made.add_special_tokens(special)
    begin, end = text.BEGIN_TOKEN, text.END_TOKEN
    made.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, text.BEGIN), (end, text.END)]
    )
    made.enable_truncation(7)  # a file may bring these along; neither may reach the ids
    made.enable_padding(length=50)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def message(source):
    with pytest.raises(InputError) as caught:
        load_text_tokenizer(source)
    line = str(caught.value)
    assert "\n" not in line and ";" in line and len(line) < 600, line
    return line


def test_template(tokenizer):
    assert tokenizer.encode("Hello world", 0) == [128000, 58, 15, 60, 9906, 1917, 128001]
    assert tokenizer.encode("Hello world", -1) == [128000, 9906, 1917, 128001]
    assert tokenizer.encode("Hello.", 999) == [128000, 58, 5500, 60, 9906, 13, 128001]
    assert tokenizer.vocab_size == 128256 and len(tokenizer.fingerprint) == 64
    with pytest.raises(ValueError, match="speaker -2"):
        tokenizer.encode("Hello.", -2)


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("speaker", [-1, 0, 2**31 - 1])
def test_text_never_becomes_special_and_comes_back(tokenizer, content, speaker):
    ids = tokenizer.encode(content, speaker)
    assert ids[0] == 128000 and ids[-1] == 128001
    assert all(0 <= i < 128000 for i in ids[1:-1])
    assert tokenizer.decode(ids) == ("" if speaker == -1 else f"[{speaker}]") + content


def test_both_file_formats_give_the_same_ids(tokenizer, json_file):
    other = load_text_tokenizer(json_file)
    for content in TEXTS:
        for speaker in (-1, 0, 30):
            ids = tokenizer.encode(content, speaker)
            assert other.encode(content, speaker) == ids, content
            assert other.decode(ids) == tokenizer.decode(ids)
    assert other.fingerprint == tokenizer.fingerprint and other.vocab_size == tokenizer.vocab_size
    assert other.name == str(json_file) and "tokenizer.model" in tokenizer.name


def test_llama_3_ids_of_the_official_implementation(tokenizer):
    official = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance()
    for content in TEXTS:
        assert tokenizer.encode(content, 3) == official.encode(f"[3]{content}", bos=True, eos=True)


def test_folders(tokenizer, json_file, tmp_path):
    assert load_text_tokenizer(json_file.parent).fingerprint == tokenizer.fingerprint
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").symlink_to(package_file())
    assert load_text_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_it_travels_between_processes(tokenizer, json_file):
    for made in (tokenizer, load_text_tokenizer(json_file)):
        copy = pickle.loads(pickle.dumps(made))
        assert copy.encode(TEXTS[4], 1) == made.encode(TEXTS[4], 1) and copy.fingerprint == made.fingerprint


def test_the_fingerprint_tells_vocabularies_apart():
    ids = TextTokenizer("a", 10, lambda s: [len(s)], str)
    assert ids.fingerprint == TextTokenizer("b", 10, lambda s: [len(s)], str).fingerprint
    assert ids.fingerprint != TextTokenizer("a", 11, lambda s: [len(s)], str).fingerprint
    assert ids.fingerprint != TextTokenizer("a", 10, lambda s: [1], str).fingerprint


# What is refused


def test_other_tokenizers_are_refused(tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(path))
    line = message(path)
    assert line.startswith(f"{path}: is not Llama-3's tokenizer: <|begin_of_text|> has id None, not 128000; take")
    path.write_text(json.dumps({"model": 3}))
    assert "is not a readable tokenizer.json" in message(path)
    path.write_text("")
    assert "is not a readable tokenizer.json" in message(path)


def test_other_models_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n" * 5)
    assert "SentencePiece models are Llama-2's" in message(path)
    path.write_bytes(b"YQ== 0\nYg== 1\n")
    assert "is not Llama-3's tokenizer: it has 2 ranks, not 128,000" in message(path)
    spec = importlib.util.find_spec("llama_models")
    if spec is not None:
        assert "ranks, not 128,000" in message(f"{spec.submodule_search_locations[0]}/llama4/tokenizer.model")


def test_sources_that_are_not_there(tmp_path):
    assert f"{tmp_path}: holds no tokenizer.json and no tokenizer.model; give --tokenizer" in message(tmp_path)
    assert "no such text tokenizer" in message(tmp_path / "tokenizer.json")
    assert "no such text tokenizer" in message("models/tokenizer.json")
    (tmp_path / "a.bin").write_bytes(b"x")
    assert "is no text tokenizer; give a tokenizer.json or a tokenizer.model" in message(tmp_path / "a.bin")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty hub cache, and a hub nobody may ask."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    monkeypatch.setattr(hub, "hub_answers", ask)
    return monkeypatch


def test_the_installed_package_comes_before_the_network(tokenizer, no_hub):
    found = load_text_tokenizer()
    assert found.name == "llama-models package" and found.fingerprint == tokenizer.fingerprint


def test_the_hub_cache_comes_first(tokenizer, json_file, no_hub):
    import huggingface_hub

    no_hub.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(json_file))
    assert load_text_tokenizer().name == "sesame/csm-1b"
    assert load_text_tokenizer("meta-llama/Llama-3.2-1B").name == "meta-llama/Llama-3.2-1B"


def test_nothing_found_names_the_ways_out(no_hub):
    import huggingface_hub

    no_hub.setattr(text, "_llama_models_file", lambda: None)
    no_hub.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = message(None)
    assert line.startswith("no text tokenizer: sesame/csm-1b is not in the hub cache, and HF_HUB_OFFLINE forbids")
    assert all(way in line for way in ("tokenizer.json", "pip install llama-models", "the hub with access"))
    no_hub.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    no_hub.setattr(hub, "hub_answers", lambda seconds: False)
    assert "does not answer" in message(None) and "does not answer" in message("someone/something")


def test_hub_errors_are_one_line(no_hub):
    import huggingface_hub
    from huggingface_hub import errors

    no_hub.setattr(hub, "hub_answers", lambda seconds: True)
    no_hub.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for kind, expected in (
        (errors.GatedRepoError, "access to a/b is not granted; accept its terms at https://"),
        (errors.RepositoryNotFoundError, "no repository a/b on the hub"),
        (errors.EntryNotFoundError, "a/b holds no tokenizer.json"),
        (OSError, "a/b could not be fetched (trouble)"),
    ):

        def fail(*args, kind=kind, **kwargs):
            error = kind.__new__(kind)  # their constructors want an HTTP response, of a class that varies by version
            error.args = ("trouble\nand more",)
            raise error

        no_hub.setattr(huggingface_hub, "hf_hub_download", fail)
        assert expected in message("a/b")


def test_a_dead_network_costs_seconds(monkeypatch):
    import huggingface_hub
    import huggingface_hub.utils

    class Session:
        def head(self, url, timeout):
            assert url == huggingface_hub.constants.ENDPOINT
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    begin = time.monotonic()
    assert not hub.hub_answers(0.2)
    assert time.monotonic() - begin < 5
    monkeypatch.setattr(Session, "head", lambda self, url, timeout: "any answer")
    assert hub.hub_answers(0.2)
