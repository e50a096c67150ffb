"""The token store: round trip, mapping, and every way its files can be wrong."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from paths import ROOT

from csm_fast.data import store_writer
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.token_store import TokenStore, TurnTokens, check_compatible, open_split
from csm_fast.system import files
from csm_fast.system.arrays import map_arrays, write_arrays
from csm_fast.system.errors import InputError
from csm_fast.system.files import old_directory

K = 4
CODEC = {"name": "fake", "fingerprint": "c" * 64, "num_codebooks": K, "codebook_size": 2048}
TEXT = {"name": "words", "fingerprint": "t" * 64, "vocab_size": 1000}


def make_conversations(count=30, seed=0):
    rng = np.random.default_rng(seed)
    conversations, source = [], 0
    for _ in range(count):
        turns = []
        for _ in range(rng.integers(1, 4)):
            text = rng.integers(0, 1000, rng.integers(1, 9)).astype(np.int32)
            codes = rng.integers(0, 2048, (rng.integers(1, 20), K)).astype(np.uint16)
            turns.append(TurnTokens(text, codes, int(rng.integers(0, 5)), source))
            source += 1
        conversations.append(turns)
    return conversations


def write_store(path, conversations, shard_frames=100, **identity):
    with TokenStoreWriter(
        path, codec={**CODEC, **identity}, text_tokenizer=TEXT, resampler="soxr-HQ", shard_frames=shard_frames
    ) as writer:
        for turns in conversations:
            writer.add_conversation(turns)
    return Path(path)


@pytest.fixture
def store_path(tmp_path):
    return write_store(tmp_path / "tokens" / "train", make_conversations())


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_round_trip_over_several_shards(store_path):
    conversations = make_conversations()
    store = TokenStore.open(store_path)
    assert len(store.manifest["shards"]) > 3
    assert len(store) == store.num_conversations == len(conversations)
    for i, wanted in enumerate(conversations):
        found = store.conversation(i)
        assert len(found) == len(wanted) == store.turn_counts[i]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a.text, b.text)
            np.testing.assert_array_equal(a.codes, b.codes)
            assert a.text.dtype == np.int32 and a.codes.dtype == np.uint16 and a.codes.flags.aligned
            assert (a.speaker, a.source_index) == (b.speaker, b.source_index)
            assert not a.codes.flags.writeable
        assert store.conversation_rows[i] == sum(len(t.text) + len(t.codes) + 1 for t in wanted)
    turns = [turn for conversation in conversations for turn in conversation]
    text, frames, speakers, conversation = store.turn_lengths()
    assert text.tolist() == [len(t.text) for t in turns] and frames.tolist() == [len(t.codes) for t in turns]
    assert speakers.tolist() == [t.speaker for t in turns]
    assert conversation.tolist() == [i for i, c in enumerate(conversations) for _ in c]
    assert (text.dtype, frames.dtype, store.conversation_rows.dtype) == (np.int32,) * 3
    assert (store.num_turns, store.num_frames) == (len(turns), frames.sum())
    assert (store.num_text_tokens, store.num_codebooks, store.codebook_size) == (text.sum(), K, 2048)
    assert sum(len(block) for block in store.code_blocks(7)) == store.num_frames
    assert store.hours == pytest.approx(store.num_frames * 0.08 / 3600, abs=1e-6)
    for index in (-1, len(conversations)):
        with pytest.raises(IndexError):
            store.conversation(index)


def test_shards_are_ordinary_safetensors(store_path):
    shard = store_path / "shard-00000.safetensors"
    arrays = safetensors.numpy.load_file(shard)
    ours = map_arrays(shard)
    assert arrays.keys() == ours.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], ours[name])
    assert arrays["codes"].dtype == np.uint16 and arrays["content_key"].shape[1:] == (32,)
    # and the library's own layout is read as well
    other = shard.with_name("other.safetensors")
    safetensors.numpy.save_file({"a": np.arange(3, dtype=np.uint8), "b": np.ones((2, 2), np.int64)}, other)
    np.testing.assert_array_equal(map_arrays(other)["b"], np.ones((2, 2)))


def test_bytes_depend_on_the_content_alone(tmp_path, store_path):
    again = write_store(tmp_path / "again", make_conversations())
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in store_path.iterdir())
    for path in again.iterdir():
        assert path.read_bytes() == (store_path / path.name).read_bytes()


def test_replacing_is_atomic_and_readers_keep_the_old_one(store_path):
    old = TokenStore.open(store_path)
    before = old.conversation(3)[0].codes.copy()
    with pytest.raises(RuntimeError, match="stop"):
        with TokenStoreWriter(store_path, codec=CODEC, text_tokenizer=TEXT, resampler="soxr-HQ") as writer:
            writer.add_conversation(make_conversations(1, seed=5)[0])
            raise RuntimeError("stop")
    assert TokenStore.open(store_path).num_conversations == 30
    write_store(store_path, make_conversations(5, seed=9))
    assert TokenStore.open(store_path).num_conversations == 5
    np.testing.assert_array_equal(old.conversation(3)[0].codes, before)
    assert [p.name for p in store_path.parent.iterdir()] == ["train"]


def test_replacing_without_the_exchange_call(store_path, monkeypatch):
    """Where the file system cannot exchange names, a kill between the two renames leaves a readable old store."""
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    write_store(store_path, make_conversations(5, seed=9))
    assert TokenStore.open(store_path).num_conversations == 5
    os.rename(store_path, old_directory(store_path))  # as that kill leaves it
    assert open_split(store_path.parent, "train").num_conversations == 5
    write_store(store_path, make_conversations(6, seed=9))
    assert TokenStore.open(store_path).num_conversations == 6
    assert [p.name for p in store_path.parent.iterdir()] == ["train"]


def test_killed_while_writing_leaves_the_old_or_the_new_store(tmp_path):
    """kill -9 while another process replaces the store over and over: what is there is always whole."""
    path = tmp_path / "tokens" / "train"
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_token_store import *\n"
        "data = [make_conversations(n, seed=n) for n in (8, 9)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for d in data: write_store(sys.argv[1], d, shard_frames=30)\n"
    )
    root = str(ROOT)
    write_store(path, make_conversations(8, seed=8), shard_frames=30)
    for moment in (0.003, 0.011, 0.018, 0.027):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(path), root, root + "/tests/data", root + "/tests/cases"],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(moment)
        child.kill()
        child.communicate()
        store = TokenStore.open(path)
        wanted = make_conversations(store.num_conversations, seed=store.num_conversations)
        for i, turns in enumerate(wanted):
            np.testing.assert_array_equal(store.conversation(i)[0].codes, turns[0].codes)


def test_threads_and_pickling(store_path):
    store = TokenStore.open(store_path)
    wanted = [t.codes for c in make_conversations() for t in c]
    found, errors = {}, []

    def read(k):
        try:
            found[k] = [t.codes for i in range(len(store)) for t in store.conversation(i)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for codes in found.values():
        assert all(np.array_equal(a, b) for a, b in zip(codes, wanted, strict=True))
    data = pickle.dumps(store)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).conversation(7)[0].codes, store.conversation(7)[0].codes)


def test_reading_a_conversation_is_cheap(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "s", make_conversations(200), shard_frames=10**6))
    store.conversation(0)  # the hash
    best = min(timed(lambda: [store.conversation(i) for i in range(200)]) for _ in range(5)) / 200
    assert best < 200e-6, f"{best * 1e6:.0f} us per conversation"  # 15 us when the machine is quiet


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_opening_reads_offsets_only(tmp_path):
    """Codes are not touched by opening: a store whose code bytes are wrong opens, and fails on use."""
    path = write_store(tmp_path / "s", make_conversations(200), shard_frames=10**6)
    shard = path / "shard-00000.safetensors"
    flip(shard, "codes")
    store = TokenStore.open(path)
    with pytest.raises(InputError, match="hash"):
        store.conversation(5)
    assert TokenStore.open(path, verify=False).conversation(5)


def flip(shard, name, value=0x01):
    """Damage one byte in the middle of an array."""
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= value
    shard.write_bytes(bytes(data))


def edit_manifest(path, change):
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def rewrite_shard(path, change):
    """Replace arrays of the first shard and make the manifest agree with its size and hash."""
    shard = path / "shard-00000.safetensors"
    arrays = safetensors.numpy.load_file(shard)
    change(arrays)
    sha256, size = write_arrays(shard, {name: [array] for name, array in arrays.items()})
    edit_manifest(path, lambda m: m["shards"][0].update(sha256=sha256, bytes=size))


def put(name, place, value):
    return lambda arrays: arrays[name].__setitem__(place, value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: (p / "manifest.json").unlink(), "not a token store"),
        (lambda p: (p / "manifest.json").write_text('{"format"'), "not JSON"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda p: (p / "manifest.json").write_text("[]"), "not the manifest"),
        (lambda p: (p / "manifest.json").write_text('{"format": "other"}'), "not the manifest"),
        (lambda p: edit_manifest(p, lambda m: m.update(format_version=2)), "upgrade csm_fast"),
        (lambda p: edit_manifest(p, lambda m: m.update(format_version="1")), "format_version"),
        (lambda p: edit_manifest(p, lambda m: m.pop("codec")), "codec.fingerprint is missing"),
        (lambda p: edit_manifest(p, lambda m: m["codec"].pop("codebook_size")), "codec.codebook_size is missing"),
        (lambda p: edit_manifest(p, lambda m: m["text_tokenizer"].pop("vocab_size")), "vocab_size is missing"),
        (lambda p: edit_manifest(p, lambda m: m.update(shards=[])), "names no shard"),
        (lambda p: edit_manifest(p, lambda m: m["shards"][0].pop("bytes")), "a shard is not described"),
        (lambda p: edit_manifest(p, lambda m: m["shards"][0].update(file="../x")), "outside the store"),
        (lambda p: edit_manifest(p, lambda m: m["counts"].update(turns=7)), "counts 7 turns"),
        (lambda p: edit_manifest(p, lambda m: m["shards"].pop(0)), "numbered"),
        (lambda p: (p / "shard-00001.safetensors").unlink(), "missing shard"),
        (lambda p: os.truncate(p / "shard-00001.safetensors", 900), "truncated: 900 bytes"),
        (lambda p: os.truncate(p / "shard-00001.safetensors", 10**5), "too long"),
        (lambda p: edit_manifest(p, lambda m: m["codec"].update(num_codebooks=8)), "codes is uint16 [88, 4], not"),
        (lambda p: rewrite_shard(p, lambda a: a.pop("speaker")), "no array 'speaker'"),
        (lambda p: rewrite_shard(p, lambda a: a.update(text=a["text"].astype(np.int64))), "text is int64"),
        (lambda p: rewrite_shard(p, lambda a: a.update(speaker=a["speaker"][1:].copy())), "speaker is int32"),
        (lambda p: rewrite_shard(p, put("code_offsets", 2, 0)), "code_offsets do not rise"),
        (lambda p: rewrite_shard(p, put("code_offsets", 1, 10**9)), "code_offsets do not rise"),
        (lambda p: rewrite_shard(p, put("text_offsets", 0, 1)), "text_offsets do not rise"),
        (lambda p: rewrite_shard(p, put("conversation", 3, 99)), "numbered"),
        (lambda p: rewrite_shard(p, put("conversation", slice(None), 1)), "numbered"),
    ],
)
def test_damage_is_found_on_opening(store_path, change, says):
    frames = TokenStore.open(store_path).manifest["shards"][0]["frames"]
    change(store_path)
    with pytest.raises(InputError) as error:
        TokenStore.open(store_path)
    assert says.replace("[88,", f"[{frames},") in one_line(error) and str(store_path) in one_line(error)


def test_a_damaged_header_is_found_on_opening(store_path):
    shard = store_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for data in (
        b"\xff" * len(whole),
        whole[:8] + b"x" * (len(whole) - 8),
        whole.replace(b'"U16"', b'"Q16"'),
        whole.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        whole[:8] + b"[]".ljust(length) + whole[8 + length :],
        whole[:8] + b'{"codes":3}'.ljust(length) + whole[8 + length :],
    ):
        shard.write_bytes(data)
        assert len(data) == len(whole)
        with pytest.raises(InputError) as error:
            TokenStore.open(store_path)
        assert "damaged" in one_line(error)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: flip(p / "shard-00000.safetensors", "codes"), "hash"),
        (lambda p: flip(p / "shard-00000.safetensors", "text"), "hash"),
        (lambda p: rewrite_shard(p, put("codes", (0, 1), 2048)), "code 2048 of 2048"),
        (lambda p: rewrite_shard(p, put("text", 0, 1000)), "text id"),
        (lambda p: rewrite_shard(p, put("text", 0, -1)), "text id"),
    ],
)
def test_damage_is_found_on_use(store_path, change, says):
    change(store_path)
    store = TokenStore.open(store_path)
    with pytest.raises(InputError) as error:
        store.conversation(0)
    assert says in one_line(error) and "shard-00000" in one_line(error)
    store.conversation(29)  # another shard, and whole


def test_what_is_no_store(tmp_path, store_path):
    with pytest.raises(InputError, match="no such directory"):
        TokenStore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a token store"):
        TokenStore.open(tmp_path / "file")
    with pytest.raises(InputError, match="there is train.*--val-data") as error:
        open_split(store_path.parent, "val")
    one_line(error)
    with pytest.raises(InputError, match="nowhere: does not exist; run csm-fast pretokenize"):
        open_split(tmp_path / "nowhere", "train")
    assert open_split(store_path.parent, "train").num_conversations == 30


def test_an_empty_store_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no conversation"):
        write_store(tmp_path / "tokens" / "train", [])
    assert not list((tmp_path / "tokens").iterdir())


def test_a_full_disk_is_one_line_and_the_old_store_stays(store_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer, "write_arrays", full)
    with pytest.raises(InputError) as error:
        write_store(store_path, make_conversations(3))
    assert "the disk is full" in one_line(error)
    monkeypatch.undo()
    assert TokenStore.open(store_path).num_conversations == 30
    assert [p.name for p in store_path.parent.iterdir()] == ["train"]


def test_check_compatible(store_path):
    store = TokenStore.open(store_path)
    check_compatible(store)
    check_compatible(
        store, codec_fingerprint="c" * 64, text_fingerprint="t" * 64, num_codebooks=K, text_vocab_size=1000
    )
    for wrong, says in (
        ({"codec_fingerprint": "d" * 64}, "made with codec fake (cccccccccccc), the model wants dddddddddddd"),
        ({"text_fingerprint": "u" * 64}, "made with text tokenizer words (tttttttttttt)"),
        ({"num_codebooks": 32}, "of 4 codebooks, the model wants 32"),
        ({"text_vocab_size": 900}, "of 1000 ids, the model wants at most 900"),
    ):
        with pytest.raises(InputError) as error:
            check_compatible(store, **wrong)
        assert says in one_line(error) and "run csm-fast pretokenize" in one_line(error)


def test_importing_it_is_light():
    code = "import sys, csm_fast.data.token_store, csm_fast.data.pretokenize; "
    code += "assert not {'torch', 'transformers', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
