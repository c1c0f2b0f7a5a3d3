"""Every example runs, at small sizes; each checks its own results and raises where they are wrong."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from examples import train_bytes, train_gpu
from examples.text import IGNORED, batches, pack

ROOT = Path(__file__).parents[2]
QUICK = {"sft_packing": {}, "prefix_lm": {"steps": 5}, "shared_question": {"steps": 2}, "window_with_sinks": {}, "relative_bias": {}}


def run(name, **sizes):
    importlib.import_module(f"examples.{name}").main(**sizes)


@pytest.mark.parametrize("name", QUICK)
def test_example(name, capsys):
    run(name, **QUICK[name])
    assert capsys.readouterr().out.count("\n") >= 2


def test_every_example_says_how_to_run_it():
    for file in (ROOT / "examples").glob("*.py"):
        text = file.read_text()
        assert text == "" or text.startswith('"""'), file
        assert ("__main__" in text) == (f"python -m examples.{file.stem}" in text), file


class TestPackedText:
    def test_targets_are_the_next_byte_of_the_same_document(self):
        batch = pack([b"abc", b"de"], 5)
        assert batch.tokens.tolist() == [list(b"abcde")]
        assert batch.targets.tolist() == [[*b"bc", IGNORED, *b"e", IGNORED]]
        assert batch.documents.tolist() == [[0, 0, 0, 1, 1]]
        assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]

    def test_a_document_that_is_cut_has_no_target_at_the_cut(self):
        assert pack([b"abc", b"de"], 4).targets.tolist() == [[*b"bc", IGNORED, IGNORED]]

    def test_documents_that_do_not_fill_a_sequence_are_refused(self):
        with pytest.raises(ValueError, match="do not fill a sequence of 9"):
            pack([b"abc", b"de"], 9)

    def test_batches_are_the_same_for_the_same_seed(self):
        first, again, other = (list(batches(2, 2, 300, seed=seed, longest=100)) for seed in (0, 0, 1))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0].tokens, other[0].tokens)
        assert not torch.equal(first[0].documents, first[1].documents)
        assert first[0].tokens.shape == (2, 300) and int(first[0].documents.max()) >= 2


class TestTrainBytes:
    SMALL = ("--steps", "12", "--length", "256", "--longest", "100", "--width", "32", "--heads", "2", "--batch", "2")

    def test_loss_falls_as_with_dense_attention_and_new_documents_need_no_new_analysis(self, capsys):
        train_bytes.main(self.SMALL)
        text = capsys.readouterr().out
        assert "12 steps, each with other documents: 12 maps, 0 masks analysed anew" in text
        assert float(re.search(r"largest difference (\S+)", text)[1]) < 1e-5

    def test_another_mask_is_noticed(self, monkeypatch, capsys):
        monkeypatch.setattr(
            train_bytes, "dense", lambda batch: train_bytes.partial(train_bytes.F.scaled_dot_product_attention, is_causal=True)
        )
        with pytest.raises(SystemExit, match="trained apart"):
            train_bytes.main((*self.SMALL[:1], "3", *self.SMALL[2:]))


class TestTrainGpu:
    def test_a_tiny_version_runs_on_the_cpu(self, capsys):
        found = train_gpu.main(("--device", "cpu", "--steps", "2"))
        ours, dense = found["flexmask"], found["dense SDPA"]
        assert ours.losses == pytest.approx(dense.losses, abs=2e-3)
        assert ours.losses[1] < ours.losses[0]
        assert "FlexAttention was skipped: FlexAttention does not support backward on CPU" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_what_to_do(self):
        with pytest.raises(SystemExit, match="--device cpu"):
            train_gpu.main(())

    def test_steps_that_would_all_be_warm_up_are_refused(self, capsys):
        with pytest.raises(SystemExit):
            train_gpu.main(("--device", "cpu", "--steps", "1"))
        assert "1 steps leave none to time after 1 of warm-up" in capsys.readouterr().err

    def test_the_three_ways_keep_the_same_pairs(self):
        (batch,) = batches(1, 2, 256, longest=100)
        blocks, dense = train_gpu.torch_block_mask(train_gpu.create_block_mask, batch), train_gpu.dense_mask(1, batch)
        mask = train_gpu.by_flexmask(batch.documents).keywords["mask"]
        assert torch.equal(mask.to_dense(256, 256, batch=2), dense)
        b, q_idx, kv_idx = torch.meshgrid(torch.arange(2), torch.arange(256), torch.arange(256), indexing="ij")
        assert torch.equal(blocks.mask_mod(b, 0, q_idx, kv_idx), dense[:, 0])

    def test_one_graph_with_the_mask_built_inside_serves_all_batches(self):
        counted = CompileCounterWithBackend("aot_eager")
        torch.compiler.reset()
        step = torch.compile(train_gpu.loss_of, backend=counted, fullgraph=True)
        model = train_gpu.ByteModel(32, 2, 1)
        for batch in batches(3, 2, 128, longest=50):
            given = (batch.tokens, batch.targets, batch.positions)
            found, expected = (run(model, train_gpu.by_flexmask, given, batch.documents) for run in (step, train_gpu.loss_of))
            found.backward()
            assert found.item() == pytest.approx(expected.item(), abs=2e-3)
        assert counted.frame_count == 1
