"""The two layouts beside each other and beside full logits, and the trainer for losses with K negatives."""

import copy
import inspect
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import HfArgumentParser

from pref_opt.baselines import SDPOLoss
from pref_opt.data import truncate_prompts
from pref_opt.losses import LossOutput, PreferenceLoss
from pref_opt.multi_negative import (
    MultiNegativeCollator,
    MultiNegativeConfig,
    MultiNegativeTrainer,
    _tokenized,
    batch_logps,
    packed_attention_mask,
    tokenize_lists,
)
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
SLOW = pytest.mark.slow
# transformers has renamed this option.
FIELDS = MultiNegativeConfig.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


def lists(count=12, negatives=3):
    """Rows with prompts and completions of different lengths, and the features of NAPO."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "prompt": f"{'then ' * (n % 3)}{n} + {n % 5} =",
            "chosen": f" {n + n % 5}",
            "rejected": [f" {n + n % 5 + j + 1}{', or so' if (n + j) % 2 else ''}" for j in range(negatives)],
            "ids": n,
            "user_embeddings": torch.randn(4, generator=generator).tolist(),
            "negative_scores": torch.randn(negatives, generator=generator).tolist(),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(text for row in lists() for text in (row["prompt"], row["chosen"], *row["rejected"]))


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(lists())


# --- data --------------------------------------------------------------------------------------------------------------


def test_texts(tokenizer):
    rows = Dataset.from_list([{"prompt": "1 + 2 =", "chosen": " 3", "rejected": [" 4", " 5<|im_end|>"], "note": "x"}])
    row = tokenize_lists(rows, tokenizer)[0]
    assert set(row) == {"prompt_ids", "answer_ids", "row"}
    assert tokenizer.decode(row["prompt_ids"]) == "1 + 2 ="
    assert [tokenizer.decode(ids) for ids in row["answer_ids"]] == [" 3<|im_end|>", " 4<|im_end|>", " 5<|im_end|>"]


def test_a_completion_that_would_merge_with_the_prompt():
    tokenizer = tiny_tokenizer(["the cat"] * 50)
    rows = Dataset.from_list([{"prompt": "the c", "chosen": "at", "rejected": ["ow"]}])
    assert tokenizer("the cat")["input_ids"][: len(tokenizer("the c")["input_ids"])] != tokenizer("the c")["input_ids"]
    row = tokenize_lists(rows, tokenizer)[0]
    assert row["prompt_ids"] == tokenizer("the c")["input_ids"]
    assert [tokenizer.decode(ids) for ids in row["answer_ids"]] == ["at<|im_end|>", "ow<|im_end|>"]


def said(content, role="assistant"):
    return [{"role": role, "content": content}]


def conversations():
    """Two rows of a question, its answer and two wrong ones."""
    return [
        {"prompt": said(f"{n} + 2?", "user"), "chosen": said(f"{n + 2}"), "rejected": [said("4"), said("5")]}
        for n in (1, 5)
    ]


def test_conversations(tokenizer):
    row = tokenize_lists(Dataset.from_list(conversations()), tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in row["answer_ids"]] == [f"{n}<|im_end|>\n" for n in (3, 4, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": [said("4")]}, "row 1: 1 rejected completions, row 0 has 2; all rows must have equally many"),
        ({"rejected": said("4")}, "row 1: 1 rejected completions, row 0 has 2"),
        ({"chosen": said("")}, "row 1: chosen is empty"),
        ({"rejected": [said("4"), said("")]}, "row 1: rejected is empty"),
        ({"rejected": [said("4"), []]}, "row 1: rejected is empty"),
        ({"prompt": []}, "row 1: prompt is empty"),
        ({"chosen": said("4")}, "row 1: chosen and one of rejected are identical"),
        ({"chosen": "7"}, "row 1: chosen must be messages, as the prompt is, got '7'"),
        ({"rejected": ["4", "5"]}, "row 1: rejected must be messages, as the prompt is, got '4'"),
        ({"rejected": ["4", said("5")]}, "row 1: rejected must be messages, as the prompt is, got '4'"),
        ({"prompt": ["7 + 2?"]}, r"row 1: prompt must be messages, as the prompt is, got \['7"),
        (
            {"prompt": said("7" * 60, "user")},
            "row 1: a prompt of .* tokens and a completion of .* exceed max_length=50",
        ),
    ],
)
def test_conversations_that_cannot_be_trained_on(tokenizer, change, message):
    row = conversations()[1] | change
    # By itself, because a data set can't hold all of these beside a sound row.
    with pytest.raises(ValueError, match=message):
        _tokenized(row, 1, tokenizer=tokenizer, max_length=50, num_negatives=2, name="dataset")


def test_long_prompts_of_conversations_can_be_cut(build, tokenizer):
    rows = conversations()
    rows[1]["prompt"] = [*said("7" * 60, "user"), *said("Yes?"), *said("5 + 2?", "user")]
    data = Dataset.from_list(rows)
    with pytest.raises(
        ValueError, match=r"train_dataset, row 1: a prompt of .* exceed max_length=50; .*truncate_prompts"
    ):
        build(train_dataset=data, max_length=50)
    cut = truncate_prompts(data, tokenizer, max_prompt_length=45, max_length=50)
    assert cut.cut == 1
    assert cut.dataset[1]["prompt"][-1]["content"] == "5 + 2?"
    trainer = build(train_dataset=cut.dataset, max_length=50, max_steps=1)
    trainer.train()
    assert logged(trainer) == pytest.approx([math.log(3)], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": [" 4"]}, "dataset, row 1: 1 rejected completions, row 0 has 3; all rows must have equally many"),
        ({"rejected": []}, "row 1: rejected must be a list of at least one completion"),
        ({"chosen": ""}, "row 1: chosen is empty"),
        ({"rejected": [" 4", "", " 5"]}, "row 1: rejected is empty"),
        ({"prompt": ""}, "row 1: prompt is empty"),
        ({"chosen": " 4", "rejected": [" 3", " 4", " 5"]}, "row 1: chosen and one of rejected are identical: ' 4'"),
        ({"prompt": "7" * 60}, "row 1: a prompt of 60 tokens and a completion of .* exceed max_length=40"),
    ],
)
def test_rows_that_cannot_be_trained_on(tokenizer, change, message):
    rows = lists(3)
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        tokenize_lists(Dataset.from_list(rows), tokenizer, max_length=40)


def test_data_sets_that_cannot_be_trained_on(tokenizer, data):
    with pytest.raises(ValueError, match=r"dataset must have the columns \['rejected'\]"):
        tokenize_lists(data.remove_columns("rejected"), tokenizer)
    with pytest.raises(ValueError, match=r"dataset must have the columns \['weights'\]"):
        tokenize_lists(data, tokenizer, features=["weights"])
    with pytest.raises(ValueError, match="must have at least one row"):
        tokenize_lists(data.select([]), tokenizer)
    with pytest.raises(ValueError, match=r"must be a datasets.Dataset, got list"):
        tokenize_lists(lists(), tokenizer)
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="row 0: rejected must be a list of at least one completion, got 'c'"):
        tokenize_lists(pairs, tokenizer)


# --- layouts -----------------------------------------------------------------------------------------------------------


def random_rows(prompts, negatives, seed=0, vocabulary=200, longest=5):
    """Tokenised rows with prompts of the lengths given and completions of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(size):
        return torch.randint(3, vocabulary, (size,), generator=generator).tolist()

    sizes = torch.randint(1, longest + 1, (len(prompts), 1 + negatives), generator=generator).tolist()
    return [
        {"prompt_ids": tokens(length), "answer_ids": [tokens(size) for size in own], "row": i}
        for i, (length, own) in enumerate(zip(prompts, sizes, strict=True))
    ]


def from_full_logits(model, rows):
    """One sequence at a time, without padding, from all logits."""
    found = []
    for row in rows:
        for answer in row["answer_ids"]:
            ids = torch.tensor([[*row["prompt_ids"], *answer]])
            logps = model(input_ids=ids).logits[0].log_softmax(1)
            start = len(row["prompt_ids"])
            found.append(sum(logps[start + t - 1, token] for t, token in enumerate(answer)))
    return torch.stack(found).view(len(rows), -1)


def in_double(model):
    """Return the model in float64 throughout: transformers' norms compute in float32 whatever their input."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model.double()


# Eager attention has its softmax in float32, which leaves differences of rounding.
@pytest.mark.parametrize(("attention", "atol"), [("sdpa", 1e-12), ("eager", 1e-5)])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("negatives", [1, 3, 15])
def test_layouts_are_equal(tokenizer, architecture, attention, atol, negatives):
    model = in_double(tiny_causal_lm(tokenizer, architecture=architecture, hidden=32, attn_implementation=attention))
    rows = random_rows([7, 1, 12], negatives)
    weight = torch.randn(3, 1 + negatives, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = from_full_logits(model, rows)
    assert exact.dtype == torch.float64
    exact_grads = torch.autograd.grad((weight * exact).sum(), list(model.parameters()))
    for layout in ("packed", "concatenated"):
        logps = batch_logps(model, MultiNegativeCollator(0, layout=layout)(rows))
        torch.testing.assert_close(logps, exact, rtol=0, atol=atol)
        grads = torch.autograd.grad((weight * logps).sum(), list(model.parameters()))
        for got, want in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=10 * atol)


def test_scaled_and_capped_logits(tokenizer):
    """The head of Granite divides its logits, that of Gemma 2 caps them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    models = (
        GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.1, sliding_window=64)),
    )
    for model in models:
        model = model.double().eval()
        rows = random_rows([5, 9], 2)
        for layout in ("packed", "concatenated"):
            logps = batch_logps(model, MultiNegativeCollator(0, layout=layout)(rows))
            torch.testing.assert_close(logps, from_full_logits(model, rows), rtol=0, atol=1e-6)


def test_number_of_tokens():
    row = {"prompt_ids": [5] * 60, "answer_ids": [[6, 7, 8, 9]] * 16, "row": 0}
    assert MultiNegativeCollator(0)([row])["input_ids"].numel() == 124
    assert MultiNegativeCollator(0, layout="concatenated")([row])["input_ids"].numel() == 1024
    rows = random_rows([7, 3], 4)
    batch = MultiNegativeCollator(0)(rows)
    assert (batch["segments"] >= 0).sum(1).tolist() == [
        len(row["prompt_ids"]) + sum(len(answer) for answer in row["answer_ids"]) for row in rows
    ]


def test_mask_of_padding_and_dtype():
    segments = torch.tensor([[0, 0, 1, 2, 2, -1]])
    mask = packed_attention_mask(segments, torch.float16)
    assert mask.dtype == torch.float16
    assert mask.isfinite().all()
    assert (mask == 0).any(3).all()  # nobody is left without anything to see
    assert not (mask[0, 0, :5, 5] == 0).any()  # padding is seen by itself only
    assert [(mask[0, 0, query] == 0).nonzero().flatten().tolist() for query in (2, 3, 4)] == [
        [0, 1, 2],
        [0, 1, 3],
        [0, 1, 3, 4],
    ]


def test_batches_that_do_not_fit():
    rows = random_rows([3, 3], 2)
    rows[1]["answer_ids"].append([4])
    for layout in ("packed", "concatenated"):
        with pytest.raises(ValueError, match="row 1 has 3 rejected completions, row 0 of the same batch has 2"):
            MultiNegativeCollator(0, layout=layout)(rows)
    rows = random_rows([3, 3], 2)
    for row, scores in zip(rows, ([0.5], [0.5, 1.0]), strict=True):
        row["negative_scores"] = scores
    with pytest.raises(ValueError, match=r"negative_scores must have one shape in all rows, got \(2,\) in row 1"):
        MultiNegativeCollator(0)(rows)
    with pytest.raises(ValueError, match="did you mean 'packed'"):
        MultiNegativeCollator(0, layout="pack")


def test_a_model_that_has_learned_stays_a_model(tokenizer):
    model = tiny_causal_lm(tokenizer, hidden=32)
    ids = torch.tensor([[5, 6, 7]])
    before, signature = model(ids).logits, inspect.signature(model.forward).parameters.keys()
    batch = MultiNegativeCollator(0)(random_rows([4], 2))
    logps = batch_logps(model, batch)
    assert torch.equal(model(ids).logits, before)
    assert inspect.signature(model.forward).parameters.keys() == signature
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.equal(batch_logps(twin, batch), logps)  # a copy has its own weights
    assert not torch.equal(batch_logps(model, batch), logps)
    assert torch.equal(twin(ids).logits, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_models_that_cannot_be_used(tokenizer, build):
    batch = MultiNegativeCollator(0)(random_rows([4], 2))
    model = tiny_causal_lm(tokenizer, hidden=32, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="must have a linear head without an adapter, got Linear in"):
        batch_logps(get_peft_model(model, LoraConfig(target_modules=["lm_head"])), batch)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="adapter that adds virtual tokens"):
        batch_logps(get_peft_model(tiny_causal_lm(tokenizer, hidden=32), prompts), batch)
    with pytest.raises(ValueError, match="model must be a causal model of transformers, got Linear"):
        build(model=torch.nn.Linear(2, 2))
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    with pytest.raises(ValueError, match="layout='packed' can't be used: Qwen2ForCausalLM sees 16 tokens back"):
        build(model=tiny_causal_lm(tokenizer, hidden=32, **sliding))
    build(model=tiny_causal_lm(tokenizer, hidden=32, **sliding), layout="concatenated")
    build(model=tiny_causal_lm(tokenizer, hidden=32, **sliding), max_length=16, train_dataset=None)


# --- trainer -----------------------------------------------------------------------------------------------------------

COMMON = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "max_length": 48,
    "save_strategy": "no",
    "seed": 0,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def build(tmp_path, tokenizer, data):
    """Return a function that makes a trainer with the method and the options given."""

    def make(method="sdpo", method_kwargs=None, **options):
        names = ("model", "ref_model", "loss", "train_dataset", "eval_dataset", "peft_config", "processing_class")
        given = {name: options.pop(name) for name in names if name in options}
        given = {"train_dataset": data, "processing_class": tokenizer, **given}
        model = given.pop("model", None) or tiny_causal_lm(tokenizer, hidden=32)
        folder = options.pop("output_dir", str(tmp_path / "out"))
        args = MultiNegativeConfig(folder, **COMMON | {"method": method, "method_kwargs": method_kwargs} | options)
        return MultiNegativeTrainer(model, args=args, **given)

    return make


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_first_loss_with_an_adapter(build):
    trainer = build(peft_config=LORA)
    assert trainer.ref_model is None
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(4), abs=1e-6)
    assert logged(trainer)[-1] != pytest.approx(math.log(4), abs=1e-6)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


def test_layouts_references_and_accumulation_train_alike(build, tokenizer):
    """The reference is a copy of the model, the model that is given, or none."""
    start = tiny_causal_lm(tokenizer, hidden=32)
    runs = [
        build(),
        build(layout="concatenated"),
        build(ref_model=copy.deepcopy(start)),
        build(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    ]
    for trainer in runs:
        trainer.train()
        assert logged(trainer) == pytest.approx(logged(runs[0]), abs=1e-6)
        assert logged(trainer, "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), start.parameters(), strict=True))
    assert logged(runs[0])[0] == pytest.approx(math.log(4), abs=1e-6)
    packed, concatenated = (logged(trainer, "num_tokens")[-1] for trainer in runs[:2])
    assert packed < 0.7 * concatenated
    assert logged(runs[3], "num_tokens")[-1] == packed


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=SLOW)])
def test_a_stored_reference_trains_alike(build, data, tokenizer, adapter):
    start = tiny_causal_lm(tokenizer, hidden=32)
    given = {"peft_config": LORA} if adapter else {}
    stored = {"precompute_ref_log_probs": True, "eval_dataset": data, "per_device_eval_batch_size": 5}
    usual = build("dmpo", model=copy.deepcopy(start), eval_dataset=data, **given)
    runs = [
        build("dmpo", model=copy.deepcopy(start), **given, **stored),
        build("dmpo", model=copy.deepcopy(start), ref_model=copy.deepcopy(start), **given, **stored),
    ]
    # what was stored once is taken as it is
    again = runs[0].train_dataset
    runs.append(build("dmpo", model=copy.deepcopy(start), train_dataset=again, **given, **stored))
    assert torch.tensor(again["ref_logps"][:]).shape == (12, 4)
    usual.train()
    expected = usual.evaluate()
    for trainer in runs:
        assert trainer.ref_model is None
        trainer.train()
        assert logged(trainer) == pytest.approx(logged(usual), abs=1e-6)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("given", [{}, pytest.param({"peft_config": LORA}, marks=SLOW)], ids=["model", "adapter"])
def test_a_stored_reference_is_computed_in_the_precision_of_training(build, given):
    for stored in (False, True):
        recorder = Recorder()
        build(loss=recorder, precompute_ref_log_probs=stored, bf16=True, max_steps=1, **given).train()
        torch.testing.assert_close(recorder.seen[0][0].ref_chosen, recorder.seen[0][0].chosen, rtol=0, atol=1e-4)
    exact = Recorder()
    build(loss=exact, max_steps=1, **given).train()
    assert (exact.seen[0][0].chosen - recorder.seen[0][0].chosen).abs().max() > 5e-4  # five times the tolerance above


def test_stored_values_are_those_that_count(build):
    rows = [row | {"ref_logps": [-1.0, -2.0, -3.0, -4.0]} for row in lists()]
    recorder = Recorder()
    trainer = build(loss=recorder, train_dataset=Dataset.from_list(rows), precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    assert recorder.seen[0][0].ref_chosen.tolist() == [-1.0] * 4
    assert recorder.seen[0][0].ref_rejected.tolist() == [[-2.0, -3.0, -4.0]] * 4
    # without the option the reference is asked
    asked = Recorder()
    build(loss=asked, train_dataset=Dataset.from_list(rows), max_steps=1).train()
    assert torch.equal(asked.seen[0][0].ref_chosen, asked.seen[0][0].chosen)


def test_stored_references_that_do_not_fit(build, data):
    with pytest.raises(ValueError, match="precompute_ref_log_probs must be off for method 'mppo'"):
        build("mppo", precompute_ref_log_probs=True)
    rows = [row | {"ref_logps": [-1.0] * 3} for row in lists()]
    with pytest.raises(ValueError, match="train_dataset, row 0: ref_logps must have 4 numbers, got 3"):
        build(train_dataset=Dataset.from_list(rows))
    trainer = build(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="eval_dataset must be given when the trainer is made"):
        trainer.evaluate(data)
    rows = [row | {"ref_logps": [-1.0, -2.0, math.nan, -3.0]} for row in lists()]
    with pytest.raises(ValueError, match="under the reference must be finite, got nan in row"):
        build(train_dataset=Dataset.from_list(rows), precompute_ref_log_probs=True).train()


class Recorder(SDPOLoss):
    """S-DPO that keeps what it was given."""

    def __init__(self, **switches):
        super().__init__()
        self.seen = []
        for name, value in switches.items():
            setattr(self, name, value)

    def __call__(self, logps, context):
        self.seen.append((logps, context))
        return super().__call__(logps, context)


def test_what_a_loss_is_given(build, tokenizer):
    model = tiny_causal_lm(tokenizer, hidden=32)
    sums, means = Recorder(), Recorder(length_normalized=True)
    for loss in (sums, means):
        trainer = build(loss=loss, model=copy.deepcopy(model), max_steps=1, eval_dataset=Dataset.from_list(lists(4)))
        trainer.evaluate()
    (one, context), (mean, _) = sums.seen[0], means.seen[0]
    assert not context.training
    rows = [trainer.eval_dataset[i] for i in range(4)]
    exact = from_full_logits(model, rows)
    torch.testing.assert_close(one.chosen, exact[:, 0])
    torch.testing.assert_close(one.rejected, exact[:, 1:])
    torch.testing.assert_close(one.ref_rejected, exact[:, 1:])
    assert one.rejected_lengths.tolist() == [[len(ids) for ids in row["answer_ids"][1:]] for row in rows]
    torch.testing.assert_close(mean.chosen, one.chosen / one.chosen_lengths)
    torch.testing.assert_close(mean.ref_rejected, one.rejected / one.rejected_lengths)
    assert set(one.features) == {"ids", "user_embeddings", "negative_scores"}
    torch.testing.assert_close(one.features["negative_scores"], torch.tensor([row["negative_scores"] for row in rows]))
    assert one.features["ids"].dtype == torch.long


@pytest.mark.parametrize("method", ["sdpo", "dmpo", "mppo", "napo", "dynamic_po"])
def test_every_loss_trains_and_reports(build, data, method):
    trainer = build(method, eval_dataset=data, max_steps=2, eval_strategy="steps", eval_steps=2)
    assert (trainer.ref_model is None) == (method in ("mppo", "napo"))
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    for name in ("rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/rejected", "num_tokens"):
        assert math.isfinite(last[name])
    own = {"napo": "margin/gamma", "dynamic_po": "boundary/fraction"}.get(method, "rewards/margins")
    assert math.isfinite(last[own])
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert math.isfinite(evaluated[f"eval_{own}"])


def test_evaluation_changes_no_state(build, data):
    trainer = build("napo", max_steps=2)
    trainer.train()
    state, weights = trainer.loss.state_dict(), copy.deepcopy(trainer.model.state_dict())
    trainer.model.train()
    first, second = trainer.evaluate(data), trainer.evaluate(data)
    assert trainer.loss.state_dict() == state
    assert state["num_updates"] == 2
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    for name in ("eval_loss", "eval_margin/gamma", "eval_rewards/accuracies"):
        assert first[name] == second[name]


def test_resumed_training_is_the_same(build, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = build("napo", {"momentum": 0.8}, **options)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with safe_open(checkpoint / "preference_loss.safetensors", framework="pt") as file:
        assert file.metadata() == {"method": "napo", "numbers": '{"num_updates": 2}'}
        assert list(file.keys()) == ["score_ema"]
    rest = build("napo", {"momentum": 0.8}, output_dir=str(tmp_path / "rest"), **options)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert logged(rest) == logged(whole)
    assert logged(rest, "margin/gamma")[2:] == logged(whole, "margin/gamma")[2:]
    assert rest.loss.state_dict() == whole.loss.state_dict()
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="was written by method 'napo', but 'sdpo' is trained"):
        build().train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "preference_loss.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing: the checkpoint must hold the state of method 'napo'"):
        build("napo").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # older PEFT, of a model without a name
def test_resumed_training_with_an_adapter_is_the_same(build, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "peft_config": LORA}
    options |= {CHECKPOINTING: True}
    whole = build("dynamic_po", **options)
    whole.train()
    rest = build("dynamic_po", output_dir=str(tmp_path / "rest"), **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(rest) == logged(whole)
    assert min(logged(whole, "grad_norm")) > 0
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_checkpoint_is_found(build):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    build("napo", **options).train()
    again = build("napo", **options | {"max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.loss.state_dict()["num_updates"] == 3


def test_log_probabilities_that_are_not_finite(build, data, tokenizer):
    model = tiny_causal_lm(tokenizer, hidden=32, tie_word_embeddings=False)
    token = tokenizer("z")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    rows = lists()
    rows[7]["rejected"][1] = "zz"
    trainer = build(model=model, train_dataset=Dataset.from_list(rows), max_steps=3)
    with pytest.raises(ValueError, match="under the reference must be finite, got nan in row 7 of the data set"):
        trainer.train()


class Window(Recorder):
    wants_window = True


class Pairs(PreferenceLoss):
    def __call__(self, logps, context):
        return LossOutput(logps.chosen.mean(), logps.chosen, logps.rejected)


def test_losses_and_arguments_that_do_not_fit(build, tokenizer):
    with pytest.raises(ValueError, match=r"method 'dpo' takes pairs: .* use pref_opt.trl.PreferenceTrainer"):
        build("dpo")
    with pytest.raises(ValueError, match="method 'Pairs' takes pairs"):
        build(loss=Pairs())
    with pytest.raises(ValueError, match="method 'Window' looks at whole optimiser steps"):
        build(loss=Window())
    with pytest.raises(ValueError, match="did you mean 'napo'"):
        build("nappo")
    with pytest.raises(ValueError, match="did you mean 'packed'"):
        build(layout="pack")
    with pytest.raises(ValueError, match="loss must not be an object where args name another: got 'Recorder' beside"):
        build("sdpo", {"beta": 2.0}, loss=Recorder())
    with pytest.raises(ValueError, match=r"loss must be args.method if both are given, got 'mppo' and 'napo'"):
        build("napo", loss="mppo")
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        build("sdpo", {"beta": 0})
    with pytest.raises(ValueError, match="'sdpo' doesn't accept"):
        build("sdpo", {"betta": 1.0})
    with pytest.raises(ValueError, match="method_kwargs must be a dictionary or its JSON"):
        build("sdpo", "{beta: 2}")
    with pytest.raises(ValueError, match="max_length must be an integer >= 2"):
        build(max_length=1)
    with pytest.raises(ValueError, match="processing_class must be the tokenizer"):
        build(processing_class=None)
    model = tiny_causal_lm(tokenizer, hidden=32)
    with pytest.raises(ValueError, match="ref_model must be None for method 'mppo'"):
        build("mppo", ref_model=copy.deepcopy(model))
    with pytest.raises(ValueError, match="ref_model must not be the model that is trained"):
        build(model=model, ref_model=model)
    rows = lists()
    rows[5]["rejected"] = rows[5]["rejected"][:2]
    with pytest.raises(ValueError, match="train_dataset, row 5: 2 rejected completions, row 0 has 3"):
        build(train_dataset=Dataset.from_list(rows))


def test_command_line():
    parser = HfArgumentParser(MultiNegativeConfig)
    line = "--output_dir out --use_cpu --report_to none --method dynamic_po --layout concatenated --max_length 99"
    (args,) = parser.parse_args_into_dataclasses([*line.split(), "--method_kwargs", '{"base": "mppo"}'])
    assert (args.method, args.method_kwargs, args.layout) == ("dynamic_po", {"base": "mppo"}, "concatenated")
    assert (args.max_length, args.remove_unused_columns, args.feature_columns) == (99, False, None)


def test_dropout_is_off_unless_asked_for(build):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])

    def rates(trainer):
        return {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}

    assert rates(build(peft_config=lora)) == {0.0}
    assert rates(build(peft_config=lora, disable_dropout=False)) == {0.5}


# --- does it learn -----------------------------------------------------------------------------------------------------


def catalogue(count, seed, negatives=3):
    """Two groups of items; who has had three of one group wants another of that group."""
    generator = torch.Generator().manual_seed(seed)
    groups = ("abcdef", "uvwxyz")
    rows = []
    for _ in range(count):
        group = int(torch.randint(2, (1,), generator=generator))
        own, other = groups[group], groups[1 - group]
        order = torch.randperm(6, generator=generator).tolist()
        others = torch.randperm(6, generator=generator).tolist()[:negatives]
        rows.append(
            {
                "prompt": "".join(own[i] for i in order[:3]) + ":",
                "chosen": own[order[3]],
                "rejected": [other[i] for i in others],
                "ids": len(rows),
                "user_embeddings": [1.0, 0.0] if group else [0.0, 1.0],
                "negative_scores": [0.0] * negatives,
            }
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "method", ["sdpo", "napo", *(pytest.param(name, marks=SLOW) for name in ("dmpo", "dynamic_po"))]
)
def test_learns_a_tiny_catalogue(build, method):
    trainer = build(
        method,
        {"alpha": 0.0} if method == "napo" else {"margin": 0.0} if method == "dynamic_po" else None,
        train_dataset=catalogue(256, 0),
        eval_dataset=catalogue(64, 1),
        max_steps=60,
        per_device_train_batch_size=16,
        optim="adamw_torch",
        learning_rate=5e-3,
        logging_steps=60,
    )
    before = trainer.evaluate()["eval_rewards/accuracies" if method == "napo" else "eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] > 0.9  # by chance 1/4
    if method != "napo":
        assert after["eval_loss"] < 0.5 * before
