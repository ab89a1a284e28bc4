"""DynamicPO, NAPO, the two layouts and the trainer for K negatives on CUDA."""

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest.importorskip("datasets")

from datasets import Dataset
from peft import LoraConfig

from pref_opt.dynamic_po import boundary_mask, dynamic_po_loss, optimal_kmeans_1d
from pref_opt.losses import Logps, LossContext, make_loss
from pref_opt.multi_negative import MultiNegativeCollator, MultiNegativeConfig, MultiNegativeTrainer, batch_logps
from pref_opt.napo import napo_loss, train_sasrec
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# transformers has renamed this option.
FIELDS = MultiNegativeConfig.__dataclass_fields__
CHECKPOINTING = {"activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing": True}


def logps(users=64, negatives=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randn(users, generator=generator) * 3 - 12
    rejected = torch.randn(users, negatives, generator=generator) * 4 - 16
    features = {
        "user_embeddings": torch.randn(users, 8, generator=generator),
        "negative_scores": torch.randn(users, negatives, generator=generator),
        "ids": torch.arange(users),
        "chosen_items": torch.randint(30, (users,), generator=generator),
        "rejected_items": torch.randint(30, (users, negatives), generator=generator),
    }
    return chosen, rejected, chosen - 0.5, rejected + 0.5, features


@pytest.mark.parametrize("base", ["dmpo", "mppo", "sdpo"])
def test_dynamic_po_equals_the_processor(base):
    chosen, rejected, ref_chosen, ref_rejected, _ = logps()
    refs = () if base == "mppo" else (ref_chosen, ref_rejected)
    results = []
    for device in ("cpu", "cuda"):
        c, n = (x.to(device).requires_grad_() for x in (chosen, rejected))
        loss = dynamic_po_loss(c, n, *(x.to(device) for x in refs), base=base)
        results.append((loss, *torch.autograd.grad(loss, (c, n))))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-7)
    assert torch.equal(boundary_mask(chosen.cuda(), rejected.cuda()).cpu(), boundary_mask(chosen, rejected))
    assert torch.equal(optimal_kmeans_1d(rejected.cuda(), 3).cpu(), optimal_kmeans_1d(rejected, 3))


def test_napo_equals_the_processor():
    chosen, rejected, _, _, features = logps()
    results = []
    for device in ("cpu", "cuda"):
        c, n = (x.to(device).requires_grad_() for x in (chosen, rejected))
        loss = make_loss("napo")
        out = loss(Logps(c, n, features={name: x.to(device) for name, x in features.items()}), LossContext())
        results.append((out.loss, *torch.autograd.grad(out.loss, (c, n)), loss.state_dict()["score_ema"]))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["dynamic_po", "napo"])
def test_losses_do_not_wait_for_the_device(method):
    chosen, rejected, ref_chosen, ref_rejected, features = logps()
    loss = make_loss(method)
    on_device = [x.cuda() for x in (chosen, rejected, ref_chosen, ref_rejected)]
    given = Logps(*on_device, features={name: x.cuda() for name, x in features.items()})
    loss(given, LossContext())  # the first call moves the state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(given, LossContext())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_half_precision():
    chosen, rejected, ref_chosen, ref_rejected, features = (
        x.cuda().bfloat16() if isinstance(x, torch.Tensor) else x for x in logps()
    )
    users = features["user_embeddings"].cuda()
    for loss, exact in (
        (
            dynamic_po_loss(chosen, rejected, ref_chosen, ref_rejected, base="sdpo"),
            dynamic_po_loss(*(x.double() for x in (chosen, rejected, ref_chosen, ref_rejected)), base="sdpo"),
        ),
        (napo_loss(chosen, rejected, users), napo_loss(chosen.double(), rejected.double(), users.double())),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)


def rows(prompts, negatives, longest=5):
    generator = torch.Generator().manual_seed(0)

    def tokens(size):
        return torch.randint(3, 200, (size,), generator=generator).tolist()

    sizes = torch.randint(1, longest + 1, (len(prompts), 1 + negatives), generator=generator).tolist()
    return [
        {"prompt_ids": tokens(length), "answer_ids": [tokens(size) for size in own], "row": i}
        for i, (length, own) in enumerate(zip(prompts, sizes, strict=True))
    ]


def on_device(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_layouts_are_equal(attention, dtype, atol):
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, attn_implementation=attention).to("cuda", dtype)
    exact_model = tiny_causal_lm(tokenizer, attn_implementation=attention).double()
    batch = {
        layout: MultiNegativeCollator(0, layout=layout)(rows([40, 7, 23], 15)) for layout in ("packed", "concatenated")
    }
    exact = batch_logps(exact_model, batch["concatenated"])
    for part in batch.values():
        got = batch_logps(model, on_device(part))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=atol)


def test_the_packed_layout_needs_less_memory():
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(tokenizer, hidden=256, layers=4).cuda()
    lists = rows([300] * 4, 15)
    peaks = {}
    for layout in ("packed", "concatenated"):
        batch = on_device(MultiNegativeCollator(0, layout=layout)(lists))
        for _ in range(2):  # the first run allocates workspaces
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            batch_logps(model, batch).sum().backward()
            peaks[layout] = torch.cuda.max_memory_allocated() - before
            model.zero_grad()
    assert peaks["packed"] < 0.4 * peaks["concatenated"]


@pytest.mark.parametrize("method", ["sdpo", "dynamic_po", "napo"])
def test_trains_in_half_precision_with_adapters_and_checkpointing(tmp_path, method):
    generator = torch.Generator().manual_seed(0)
    data = Dataset.from_list(
        [
            {
                "prompt": f"{n} + {n % 5} =",
                "chosen": f" {n + n % 5}",
                "rejected": [f" {n + n % 5 + j + 1}" for j in range(3)],
                "user_embeddings": torch.randn(4, generator=generator).tolist(),
                "negative_scores": torch.randn(3, generator=generator).tolist(),
            }
            for n in range(32)
        ]
    )
    tokenizer = tiny_tokenizer()
    args = MultiNegativeConfig(
        str(tmp_path),
        method=method,
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        bf16=True,
        save_strategy="no",
        disable_tqdm=True,
        max_length=64,
        **CHECKPOINTING,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = MultiNegativeTrainer(
        tiny_causal_lm(tokenizer), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    if method == "sdpo":
        assert losses[0] == pytest.approx(math.log(4), abs=1e-3)
        assert losses[-1] < losses[0]


def test_sasrec_learns_a_cycle():
    sequences = [[(start + i) % 12 for i in range(6)] for start in range(12)] * 5
    model = train_sasrec(sequences, 12, hidden=16, epochs=30, batch_size=32, learning_rate=1e-2, device="cuda")
    users = model(model.pad([[i, (i + 1) % 12] for i in range(12)]))
    hits = (model.scores(users).argmax(1).cpu() == (torch.arange(12) + 2) % 12).float().mean()
    assert hits > 0.9
