"""Hessian products: both modes against the dense Hessian, structures, and what must stay untouched."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ihvp import make_hvp, module_loss
from ihvp.hvp import hvp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x = torch.randn(10, 4, generator=seeded(), dtype=torch.float64)
    y = torch.arange(10) % 3
    return model, lambda m, x, y: F.cross_entropy(m(x), y), (x, y)


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x, edge_index):
        source, target = edge_index

        def propagate(h):
            return torch.zeros_like(h).index_add(0, target, h[source])

        return propagate(torch.relu(propagate(self.first(x))).pow(2) @ self.second.weight.T)


def gcn():
    torch.manual_seed(0)
    edges = torch.randint(0, 8, (2, 24), generator=seeded(1))
    x = torch.randn(8, 4, generator=seeded(2), dtype=torch.float64)
    y = torch.arange(8) % 3
    return GCN().double(), lambda m, x, e, y: F.cross_entropy(m(x, e), y, reduction="sum"), (x, edges, y)


class Transformer(nn.Module):
    """One block with attention from matrix products."""

    def __init__(self, attention="eager"):
        super().__init__()
        self.attention = attention
        self.embed = nn.Embedding(7, 6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, tokens):
        h = self.embed(tokens)
        q, k, v = self.qkv(h).chunk(3, -1)
        if self.attention == "eager":
            mixed = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return self.head(F.gelu(self.norm(h + self.out(mixed))))


def transformer(attention="eager"):
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (3, 5), generator=seeded())

    def loss(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Transformer(attention).double(), loss, (tokens,)


def vector(params, seed=3):
    generator = seeded(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def dense_product(loss_fn, params, v):
    """The product from the dense Hessian of torch, on one flat vector."""
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def on_flat(x):
        parts = x.split(sizes)
        return loss_fn({n: part.view(s) for n, part, s in zip(params, parts, shapes, strict=True)})

    return torch.autograd.functional.hessian(on_flat, flat(params)) @ flat(v)


@pytest.mark.parametrize("build", [mlp, gcn, transformer], ids=["mlp", "gcn", "transformer"])
@pytest.mark.parametrize("mode", ["auto", "fwd-rev", "rev-rev"])
def test_both_modes_equal_the_dense_hessian(build, mode):
    model, loss, args = build()
    loss_fn, params = module_loss(model, loss, *args)
    v = vector(params)
    want = dense_product(loss_fn, params, v)
    assert want.norm() > 1e-3
    operator = make_hvp(loss_fn, params, mode=mode)
    for got in (hvp(loss_fn, params, v, mode=mode), operator(v), operator(v)):
        torch.testing.assert_close(flat(got), want, rtol=1e-9, atol=1e-12)
        assert not any(leaf.requires_grad for leaf in got.values())


def test_fused_attention_is_computed_by_the_plain_kernel():
    model, loss, args = transformer("fused")
    eager, _, _ = transformer()
    eager.load_state_dict(model.state_dict())
    loss_fn, params = module_loss(model, loss, *args)
    v = vector(params)
    want = flat(hvp(*module_loss(eager, loss, *args), v))
    for mode in ("fwd-rev", "rev-rev"):
        torch.testing.assert_close(flat(hvp(loss_fn, params, v, mode=mode)), want, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), a=st.floats(-3, 3), mode=st.sampled_from(["fwd-rev", "rev-rev"]))
def test_products_are_symmetric_and_linear(seed, a, mode):
    model, loss, args = mlp()
    loss_fn, params = module_loss(model, loss, *args)
    H = make_hvp(loss_fn, params, mode=mode)
    u, v = vector(params, seed), vector(params, seed + 1)
    Hu, Hv = flat(H(u)), flat(H(v))
    torch.testing.assert_close(flat(u) @ Hv, flat(v) @ Hu, rtol=1e-9, atol=1e-12)
    both = {name: u[name] + a * v[name] for name in u}
    torch.testing.assert_close(flat(H(both)), Hu + a * Hv, rtol=1e-9, atol=1e-12)
    assert not flat(H({name: torch.zeros_like(p) for name, p in params.items()})).any()


class NoForward(torch.autograd.Function):
    """A square with a second derivative but no formula for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class NoSecond(torch.autograd.Function):
    """A square whose backward can't be differentiated again."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        raise NotImplementedError("derivative is not implemented")


def test_auto_falls_back_where_an_operation_has_no_forward_mode():
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

    def loss(x):
        return (NoForward.apply(x) * x).sum()

    torch.testing.assert_close(hvp(loss, x, v), 6 * x * v)
    torch.testing.assert_close(make_hvp(loss, x)(v), 6 * x * v)
    with pytest.raises(ValueError, match="try 'rev-rev'"):
        hvp(loss, x, v, mode="fwd-rev")


def test_repeated_products_fall_back_where_a_second_derivative_is_missing(monkeypatch):
    import ihvp.hvp as module

    def broken(*_):
        raise NotImplementedError("derivative for this is not implemented")

    monkeypatch.setattr(module._GradientGraph, "__init__", broken)
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    operator = make_hvp(lambda x: (x**3).sum(), x)
    torch.testing.assert_close(operator(v), 6 * x * v)
    torch.testing.assert_close(operator(2 * v), 12 * x * v)
    with pytest.raises(ValueError, match="attn_implementation"):
        make_hvp(lambda x: (x**3).sum(), x, mode="rev-rev")(v)


def test_an_operation_without_either_form_is_explained():
    with pytest.raises(ValueError, match="mode 'rev-rev' does not work"):
        hvp(lambda x: NoSecond.apply(x).sum(), torch.ones(2), torch.ones(2))


def test_errors_of_the_loss_itself_are_left_alone():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size mismatch|inconsistent tensor size"):
        hvp(lambda x: (torch.ones(3, 3) @ x.view(2, 1)).sum(), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("mode", ["fwd-rev", "rev-rev"])
def test_pytrees_keep_their_structure(mode):
    params = {"a": torch.tensor([1.0, 2.0]), "rest": [torch.tensor(3.0), (torch.ones(1, 2),)]}
    v = {"rest": [torch.tensor(1.0), (torch.ones(1, 2),)], "a": torch.tensor([1.0, 0.0])}  # another order of keys

    def loss(p):
        return (p["a"] ** 3).sum() * p["rest"][0] + (p["rest"][1][0] ** 2).sum()

    got = hvp(loss, params, v, mode=mode)
    assert list(got) == ["a", "rest"]
    assert isinstance(got["rest"], list)
    assert isinstance(got["rest"][1], tuple)
    torch.testing.assert_close(got["a"], torch.tensor([18.0 + 3.0, 12.0]))
    torch.testing.assert_close(got["rest"][0], torch.tensor(3.0))
    torch.testing.assert_close(got["rest"][1][0], torch.full((1, 2), 2.0))


@pytest.mark.parametrize("mode", ["fwd-rev", "rev-rev", "auto"])
def test_linear_and_partly_unused_parameters_have_zero_rows(mode):
    params = {"quadratic": torch.ones(2), "linear": torch.ones(2), "unused": torch.ones(2)}
    v = {name: torch.ones(2) for name in params}
    got = hvp(lambda p: (p["quadratic"] ** 2).sum() + p["linear"].sum(), params, v, mode=mode)
    assert got["quadratic"].tolist() == [2.0, 2.0]
    assert not got["linear"].any()
    assert not got["unused"].any()
    assert not hvp(lambda p: p["linear"].sum(), params, v, mode=mode)["linear"].any()


def test_l2_adds_a_multiple_of_the_vector():
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    H = make_hvp(lambda x: (x**3).sum(), x, l2=0.25)
    torch.testing.assert_close(H(v), 6 * x * v + 0.25 * v)


def test_the_operator_stays_at_the_parameters_of_its_making():
    x, v = torch.tensor([1.0, 2.0]), torch.ones(2)
    for mode in ("fwd-rev", "rev-rev"):
        start = x.clone()
        H = make_hvp(lambda x: (x**3).sum(), start, mode=mode)
        H(v)
        start.add_(1.0)
        torch.testing.assert_close(H(v), 6 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    model, loss, (x, y) = mlp()
    model, x = model.to(dtype), x.to(dtype)
    loss_fn, params = module_loss(model, loss, x, y)
    assert {p.dtype for p in params.values()} == {torch.float32}
    single = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    single.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    v = vector(params)
    want = hvp(*module_loss(single, loss, x.float(), y), v)
    got = hvp(loss_fn, params, {name: leaf.double() for name, leaf in v.items()})
    assert {h.dtype for h in got.values()} == {torch.float32}
    torch.testing.assert_close(flat(got), flat(want), rtol=1e-5, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_half_precision_constants_meet_float32_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    x = torch.randn(5, 4, generator=seeded()).to(torch.bfloat16)
    loss_fn, params = module_loss(model, lambda m, x: m(x).pow(2).sum(), x)
    assert set(params) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert flat(hvp(loss_fn, params, vector(params))).isfinite().all()


def test_a_module_is_left_as_it_was():
    model, loss, args = mlp()
    model = nn.Sequential(model, nn.BatchNorm1d(3).double())
    model.train()
    model[1].eval()
    model[0][0].bias.requires_grad_(False)
    model(args[0]).sum().backward()
    modes = [part.training for part in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    loss_fn, params = module_loss(model, loss, *args)
    assert "0.0.bias" not in params
    for mode in ("fwd-rev", "rev-rev"):
        hvp(loss_fn, params, vector(params), mode=mode)
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).train()

    def loss(model, x):
        raise RuntimeError("of the loss")

    loss_fn, params = module_loss(model, loss, torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="of the loss"):
        loss_fn(params)
    assert all(part.training for part in model.modules())


def test_dropout_and_batch_statistics_do_not_enter():
    model, loss, args = mlp()
    loss_fn, params = module_loss(model.train(), loss, *args)
    v = vector(params)
    first, second = hvp(loss_fn, params, v), hvp(loss_fn, params, v)
    assert torch.equal(flat(first), flat(second))


def test_a_subset_of_the_parameters_gives_the_block_of_the_hessian():
    model, loss, args = mlp()
    loss_fn, params = module_loss(model, loss, *args)
    some = {name: p for name, p in params.items() if name.startswith("3.")}
    v = {name: torch.zeros_like(p) for name, p in params.items()} | vector(some)
    block = hvp(loss_fn, some, vector(some))
    whole = hvp(loss_fn, params, v)
    torch.testing.assert_close(flat(block), flat({name: whole[name] for name in some}))


def test_tied_weights_are_one_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    loss_fn, params = module_loss(model, lambda m, x: m(x).pow(2).sum(), x)
    assert list(params) == ["0.weight"]
    v = vector(params)

    def by_hand(w):
        return (torch.tanh(x @ w.T) @ w.T).pow(2).sum()

    torch.testing.assert_close(hvp(loss_fn, params, v)["0.weight"], hvp(by_hand, params["0.weight"], v["0.weight"]))


@pytest.mark.parametrize(
    ("params", "v", "match"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "structure"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "structure"),
        ({"a": torch.ones(2)}, torch.ones(2), "structure"),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)], "structure"),
        (torch.ones(2), {"a": torch.ones(2)}, "structure"),
        ({"a": torch.tensor([1, 2])}, {"a": torch.ones(2)}, "floating"),
        ({"a": 1.0}, {"a": torch.ones(2)}, "dict, list or tuple"),
        ({}, {}, "no tensor"),
    ],
)
def test_wrong_structures_are_refused(params, v, match):
    with pytest.raises(ValueError, match=match):
        hvp(lambda p: p["a"].sum(), params, v)


def test_bad_arguments_are_refused():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="mode must be one of"):
        hvp(lambda x: x.sum(), x, x, mode="rev-fwd")
    with pytest.raises(ValueError, match="l2"):
        make_hvp(lambda x: x.sum(), x, l2=-1.0)
    for mode in ("fwd-rev", "rev-rev"):
        with pytest.raises(ValueError, match="scalar"):
            hvp(lambda x: x * 2, x, x, mode=mode)
    with pytest.raises(ValueError, match="does not depend on params"):
        make_hvp(lambda _: torch.ones(()), x, mode="rev-rev")(x)
    with pytest.raises(ValueError, match="requires_grad"):
        module_loss(nn.Linear(2, 2).requires_grad_(False), lambda m: m)
    loss_fn, params = module_loss(nn.Linear(2, 2), lambda m: m.weight.sum())
    with pytest.raises(ValueError, match="unknown"):
        loss_fn({**params, "extra": torch.ones(1)})


def test_importing_loads_nothing_beyond_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import ihvp;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'numpy', 'scipy', 'sklearn', 'torch_geometric', 'transformers', 'matplotlib', 'pandas'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
