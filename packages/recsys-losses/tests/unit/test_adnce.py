from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast_testing.distributed import run_gloo
from ballast_testing.losses import check_loss
from recsys_losses.adnce import (
    ADNCELoss,
    adnce_from_similarity,
    adnce_log_weights,
    adnce_loss,
    info_nce_loss,
    kl_dro,
    kl_dro_temperature,
    phi_divergence_lower_bound,
)

F64 = torch.float64
VARIANTS = ("simclr", "graphcl", "simcse")
BUMP = {"mu": 0.4, "sigma": 0.3}


def _rng(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _cosines(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2 - 1


def _weights(row, mu, sigma):
    raw = np.exp(-0.5 * ((row - mu) / sigma) ** 2)
    return raw / raw.mean()


def _reduced(rows, reduction):
    loss = np.array(rows)
    return loss if reduction == "none" else getattr(np, reduction)(loss)


def _weighted(row, mu, sigma, temperature, frozen=None):
    weights = np.ones_like(row) if mu is None else _weights(row if frozen is None else frozen, mu, sigma)
    return weights * np.exp(row / temperature)


def loss_reference(z1, z2, *, temperature, mu=None, sigma=None, variant="simclr", reduction="mean", frozen=None):
    """The three denominators, anchor by anchor; `frozen` holds the embeddings whose weights are used."""
    first, second = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
    old = (first, second) if frozen is None else [z / np.linalg.norm(z, axis=1, keepdims=True) for z in frozen]
    size, rows = len(z1), []
    if variant == "simclr":
        every, every_old = np.concatenate([first, second]), np.concatenate(old)
        for a in range(2 * size):
            others = [j for j in range(2 * size) if j % size != a % size]
            positive = math.exp(every[a] @ every[(a + size) % (2 * size)] / temperature)
            terms = _weighted(every[others] @ every[a], mu, sigma, temperature, every_old[others] @ every_old[a])
            rows.append(-math.log(positive / (positive + terms.sum())))
        return _reduced(rows, reduction)
    for a in range(size):
        others = [j for j in range(size) if variant == "simcse" or j != a]
        terms = _weighted(second[others] @ first[a], mu, sigma, temperature, old[1][others] @ old[0][a])
        total = terms.mean() if variant == "graphcl" else terms.sum()
        rows.append(-first[a] @ second[a] / temperature + math.log(total))
    return _reduced(rows, reduction)


def loss_gradient(z1, z2, **params):
    """Central differences of the reference with the weights held at the point."""
    gradients = []
    for k, z in enumerate((z1, z2)):
        gradient = np.zeros_like(z)
        for index in np.ndindex(z.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [z1.copy(), z2.copy()]
                moved[k][index] += step
                values.append(loss_reference(*moved, **params, frozen=(z1, z2)))
            gradient[index] = (values[0] - values[1]) / 2e-5
        gradients.append(gradient)
    return gradients


def similarity_reference(
    pos, neg, mask=None, *, temperature, mu=None, sigma=None, include_positive=True, average_negatives=False,
    reduction="mean", frozen=None,
):  # fmt: skip
    rows = []
    for a in range(len(pos)):
        valid = slice(None) if mask is None else mask[a]
        old = None if frozen is None else frozen[a][valid]
        terms = _weighted(neg[a][valid], mu, sigma, temperature, old)
        total = terms.mean() if average_negatives else terms.sum()
        if include_positive:
            total = total + math.exp(pos[a] / temperature)
        rows.append(-pos[a] / temperature + math.log(total))
    return _reduced(rows, reduction)


def similarity_gradient(pos, neg, mask=None, **params):
    gradients = []
    for k, x in enumerate((pos, neg)):
        gradient = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [pos.copy(), neg.copy()]
                moved[k][index] += step
                values.append(similarity_reference(*moved, mask, **params, frozen=neg))
            gradient[index] = (values[0] - values[1]) / 2e-5
        gradients.append(gradient)
    return [*gradients, None]


# --- the battery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bump", [{}, BUMP])
@pytest.mark.parametrize("variant", VARIANTS)
def test_battery_embeddings(variant, bump):
    params = {"temperature": 0.3, "variant": variant, **bump}
    check_loss(
        adnce_loss,
        [_rng(5, 4), _rng(5, 4, seed=1)],
        params,
        loss_reference,
        module=ADNCELoss(**params),
        gradient=loss_gradient,  # the weights carry no gradient
        reductions=("sum", "mean") if variant == "simclr" else ("none", "sum", "mean"),  # 2B losses of B rows
    )


@pytest.mark.parametrize("options", [{}, {"include_positive": False}, {"average_negatives": True}])
@pytest.mark.parametrize("bump", [{}, BUMP])
@pytest.mark.parametrize("masked", [False, True])
def test_battery_similarities(options, bump, masked):
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[:, 0] = True

    def loss(pos, neg, mask, **params):
        return adnce_from_similarity(pos, neg, mask=mask, **params)

    check_loss(
        loss,
        [_cosines(5), _cosines(5, 6, seed=1), mask if masked else None],
        {"temperature": 0.3, **bump, **options},
        similarity_reference,
        gradient=similarity_gradient,
    )


# --- weights ------------------------------------------------------------------------------------------------------


@given(
    row=st.lists(st.floats(-1, 1), min_size=1, max_size=12),
    mu=st.floats(-3, 3),
    sigma=st.floats(1e-3, 100),
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_weights_have_mean_one_and_order_by_distance(row, mu, sigma):
    similarity = torch.tensor(row, dtype=F64)
    weights = adnce_log_weights(similarity, mu, sigma).exp()
    assert weights.isfinite().all()
    assert weights.mean().item() == pytest.approx(1.0)
    distance = (similarity - mu).abs()
    order = distance.argsort()
    assert (weights[order].diff() <= 1e-9 * weights.max()).all()


def test_weights_carry_no_gradient():
    similarity = _cosines(3, 5).requires_grad_()
    assert not adnce_log_weights(similarity, 0.5, 0.5).requires_grad


def test_masked_weights_are_those_of_the_valid_entries_alone():
    similarity = _cosines(7)
    mask = torch.tensor([True, False, True, True, False, True, True])
    got = adnce_log_weights(similarity, 0.3, 0.4, mask)
    torch.testing.assert_close(got[mask], adnce_log_weights(similarity[mask], 0.3, 0.4))
    assert (got[~mask] == -math.inf).all()
    assert (adnce_log_weights(similarity, 0.3, 0.4, torch.zeros(7, dtype=torch.bool)) == -math.inf).all()


@pytest.mark.parametrize("sigma", [1e-3, 1e-8, 1e-30, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_a_narrow_bump_takes_the_nearest(sigma, dtype):
    # All densities underflow here: the authors' form divides 0 by 0.
    similarity = torch.tensor([[-0.5, 0.25, 0.125], [0.5, -1.0, 0.5]], dtype=dtype)
    weights = adnce_log_weights(similarity, 0.9, sigma).exp()
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, torch.tensor([[0, 3, 0], [1.5, 0, 1.5]], dtype=dtype))
    loss = adnce_from_similarity(similarity[:, 0], similarity, temperature=0.1, mu=0.9, sigma=sigma)
    assert loss.isfinite()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mu", [0.9, -1.0, 2.0])
def test_a_narrow_bump_gives_finite_losses_and_gradients(variant, mu):
    z1, z2 = _rng(8, 4).float().requires_grad_(), _rng(8, 4, seed=1).float().requires_grad_()
    loss = adnce_loss(z1, z2, temperature=0.01, mu=mu, sigma=1e-3, variant=variant)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (z1, z2)))
    wide = adnce_loss(z1.double(), z2.double(), temperature=0.01, mu=mu, sigma=1e-3, variant=variant)
    assert loss.item() == pytest.approx(wide.item(), rel=1e-2)


# --- limits and relations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wide_bump_is_info_nce(variant):
    z1, z2 = _rng(6, 4), _rng(6, 4, seed=1)
    plain = info_nce_loss(z1, z2, temperature=0.2, variant=variant)
    wide = adnce_loss(z1, z2, temperature=0.2, mu=0.7, sigma=1e6, variant=variant)
    torch.testing.assert_close(wide, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(adnce_loss(z1, z2, temperature=0.2, variant=variant), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_similarities_are_info_nce_for_any_bump(variant):
    z = torch.ones(5, 3, dtype=F64)
    plain = info_nce_loss(z, z, temperature=0.2, variant=variant)
    expected = {"simclr": math.log(9), "graphcl": 0.0, "simcse": math.log(5)}[variant]
    assert plain.item() == pytest.approx(expected, abs=1e-12)
    for mu, sigma in ((0.7, 1.0), (-3.0, 0.01), (1.0, 1e-3)):
        bumped = adnce_loss(z, z, temperature=0.2, mu=mu, sigma=sigma, variant=variant)
        torch.testing.assert_close(bumped, plain)


def test_mu_far_above_is_an_exponential_tilt():
    # w ~ exp(mu s / sigma^2) up to exp(-s^2 / (2 sigma^2)): with both large, InfoNCE at a lower temperature.
    pos, neg, temperature = _cosines(4), _cosines(4, 9, seed=1), 0.5
    mu, sigma = 1e6, 1e3
    tilt = mu / sigma**2
    weighted = adnce_from_similarity(
        pos, neg, temperature=temperature, mu=mu, sigma=sigma, include_positive=False, reduction="none"
    )
    harder = (neg * (1 / temperature + tilt)).logsumexp(1) - (neg * tilt).logsumexp(1) + math.log(9)
    torch.testing.assert_close(weighted, harder - pos / temperature, rtol=1e-5, atol=1e-5)


def test_gradient_is_the_weighted_softmax():
    pos, neg = _cosines(4).requires_grad_(), _cosines(4, 7, seed=1).requires_grad_()
    loss = adnce_from_similarity(pos, neg, temperature=0.3, **BUMP, include_positive=False, reduction="sum")
    gradient = torch.autograd.grad(loss, (pos, neg))
    share = (neg.detach() / 0.3 + adnce_log_weights(neg, **BUMP)).softmax(1) / 0.3
    torch.testing.assert_close(gradient[1], share)
    torch.testing.assert_close(gradient[0], torch.full((4,), -1 / 0.3, dtype=F64))


def test_the_bump_lowers_the_gradient_of_the_hardest_negative():
    # A false negative at 0.95 above real ones at 0.3: what ADNCE is for.
    pos = torch.tensor([0.9], dtype=F64)
    shares = []
    for bump in ({}, {"mu": 0.3, "sigma": 0.3}):
        neg = torch.tensor([[0.95, 0.3, 0.3, 0.3]], dtype=F64, requires_grad=True)
        loss = adnce_from_similarity(pos, neg, temperature=0.3, **bump)
        gradient = torch.autograd.grad(loss, neg)[0][0]
        shares.append((gradient[0] / gradient.sum()).item())
    assert shares[0] > 0.7
    assert shares[1] < 0.4


def test_simclr_is_symmetric_and_the_others_are_not():
    z1, z2 = _rng(6, 4), _rng(6, 4, seed=1)
    for variant in VARIANTS:
        one, two = (adnce_loss(a, b, temperature=0.2, **BUMP, variant=variant) for a, b in ((z1, z2), (z2, z1)))
        assert (one - two).abs().item() < 1e-12 if variant == "simclr" else (one - two).abs().item() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_rescaling_rows_changes_nothing(variant):
    z1, z2 = _rng(6, 4), _rng(6, 4, seed=1)
    scale = torch.tensor([1e-3, 1.0, 3.0, 1e4, 1e6, 0.1], dtype=F64)[:, None]
    loss = adnce_loss(z1, z2, temperature=0.2, **BUMP, variant=variant)
    torch.testing.assert_close(
        adnce_loss(z1 * scale, z2 * scale.flip(0), temperature=0.2, **BUMP, variant=variant), loss
    )


def test_variants_are_the_similarity_form_with_their_options():
    z1, z2 = F.normalize(_rng(6, 4), dim=1), F.normalize(_rng(6, 4, seed=1), dim=1)
    scores, own = z1 @ z2.T, torch.eye(6, dtype=torch.bool)
    shared = {"temperature": 0.2, **BUMP, "reduction": "none"}
    graphcl = adnce_from_similarity(
        scores.diagonal(), scores, mask=~own, include_positive=False, average_negatives=True, **shared
    )
    torch.testing.assert_close(graphcl, adnce_loss(z1, z2, variant="graphcl", **shared))
    simcse = adnce_from_similarity(scores.diagonal(), scores, include_positive=False, **shared)
    torch.testing.assert_close(simcse, adnce_loss(z1, z2, variant="simcse", **shared))
    every = torch.cat([z1, z2])
    hidden = torch.eye(6, dtype=torch.bool).repeat(2, 2)
    simclr = adnce_from_similarity(scores.diagonal().repeat(2), every @ every.T, mask=~hidden, **shared)
    torch.testing.assert_close(simclr, adnce_loss(z1, z2, **shared))


def test_simcse_without_a_bump_is_cross_entropy_over_the_batch():
    # The InfoNCE of SimCSE and of SGL's two views of users or items.
    z1, z2 = _rng(6, 4), _rng(6, 4, seed=1)
    logits = F.cosine_similarity(z1[:, None], z2[None], dim=-1) / 0.1
    want = F.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(info_nce_loss(z1, z2, temperature=0.1, variant="simcse"), want)


def test_sgl_with_all_items_as_negatives():
    view1, view2, batch = _rng(20, 4), _rng(20, 4, seed=1), torch.tensor([3, 7, 11])
    a, b = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
    loss = adnce_from_similarity(
        (a[batch] * b[batch]).sum(1), a[batch] @ b.T, temperature=0.2, include_positive=False
    )  # fmt: skip
    torch.testing.assert_close(loss, F.cross_entropy(a[batch] @ b.T / 0.2, batch))


def test_smallest_batches():
    z1, z2 = _rng(2, 3), _rng(2, 3, seed=1)
    cosine = F.cosine_similarity(z1, z2.flip(0), dim=1)
    own = F.cosine_similarity(z1, z2, dim=1)
    loss = adnce_loss(z1, z2, temperature=0.5, **BUMP, variant="graphcl", reduction="none")
    torch.testing.assert_close(loss, (cosine - own) / 0.5)  # one negative: its weight is one
    single = adnce_loss(z1[:1], z2[:1], temperature=0.5, **BUMP, variant="simcse")
    assert single.item() == pytest.approx(0.0, abs=1e-12)


def test_rows_without_a_negative():
    pos, neg = torch.tensor([0.3, 0.4]).requires_grad_(), torch.zeros(2, 3).requires_grad_()
    mask = torch.tensor([[False] * 3, [True, False, True]])
    loss = adnce_from_similarity(pos, neg, temperature=0.5, **BUMP, mask=mask, reduction="none")
    assert loss[0].item() == 0.0
    gradients = torch.autograd.grad(loss.sum(), (pos, neg))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[1][0].any()
    with pytest.raises(ValueError, match="row 0 has no valid negative"):
        adnce_from_similarity(pos, neg, temperature=0.5, mask=mask, include_positive=False)
    with pytest.raises(ValueError, match="row 0 has no valid negative"):
        kl_dro(neg, 0.5, mask)


def test_simclr_none_is_view_one_then_view_two():
    z1, z2 = _rng(5, 4), _rng(5, 4, seed=1)
    rows = adnce_loss(z1, z2, temperature=0.3, **BUMP, reduction="none")
    np.testing.assert_allclose(rows, loss_reference(z1.numpy(), z2.numpy(), temperature=0.3, **BUMP, reduction="none"))


# --- numerics, transforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_norms_and_a_tiny_temperature_in_float32(variant):
    def run(dtype):
        z1, z2 = (_rng(6, 4) * 1e6).to(dtype).requires_grad_(), (_rng(6, 4, seed=1) * 1e-6).to(dtype).requires_grad_()
        loss = adnce_loss(z1, z2, temperature=1e-3, mu=0.7, sigma=1.0, variant=variant)
        return loss.item(), torch.autograd.grad(loss, (z1, z2))

    (loss, gradients), (want, exact) = run(torch.float32), run(F64)
    assert loss == pytest.approx(want, rel=1e-4)
    for got, reference in zip(gradients, exact, strict=True):
        assert (got.double() - reference).norm() / reference.norm() < 1e-2


def test_a_zero_row_has_similarity_zero():
    z = torch.zeros(3, 4).requires_grad_()
    loss = adnce_loss(z, z, temperature=0.1, mu=0.5, sigma=1.0)
    assert loss.item() == pytest.approx(math.log(5))
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_and_functional_gradient_equal_a_loop(variant):
    z1, z2 = _rng(3, 5, 4), _rng(3, 5, 4, seed=1)

    def loss(a, b):
        return adnce_loss(a, b, temperature=0.2, **BUMP, variant=variant)

    torch.testing.assert_close(torch.vmap(loss)(z1, z2), torch.stack([loss(*x) for x in zip(z1, z2, strict=True)]))
    leaf = z1[0].clone().requires_grad_()
    want = torch.autograd.grad(loss(leaf, z2[0]), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z1[0], z2[0]), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_device(variant):
    # A meta tensor holds no data, so whatever would read a value on the host fails here.
    z1, z2 = (torch.zeros(6, 3, device="meta", requires_grad=True) for _ in range(2))
    loss = adnce_loss(z1, z2, temperature=0.1, **BUMP, variant=variant)
    assert [g.shape for g in torch.autograd.grad(loss, (z1, z2))] == [(6, 3), (6, 3)]
    neg, mask = torch.zeros(6, 4, device="meta"), torch.ones(6, 4, device="meta", dtype=torch.bool)
    assert adnce_from_similarity(neg[:, 0], neg, temperature=0.1, mask=mask, include_positive=False).ndim == 0
    assert kl_dro(neg, 0.1, mask).value.shape == (6,)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_into_one_graph(variant):
    def loss(a, b):
        return adnce_loss(a, b, temperature=0.2, **BUMP, variant=variant)

    z1, z2 = _rng(6, 4).requires_grad_(), _rng(6, 4, seed=1)
    got, want = torch.compile(loss, fullgraph=True)(z1, z2), loss(z1, z2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z1), torch.autograd.grad(want, z1))


# --- several processes --------------------------------------------------------------------------------------------

WHOLE = 6


def gathered(rank: int, world_size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Loss and gradients of this process' rows, with negatives from all."""
    share = WHOLE // world_size
    mine = slice(rank * share, (rank + 1) * share)
    results = {}
    for variant in VARIANTS:
        for name, bump in (("plain", {}), ("bump", BUMP)):
            z1, z2 = _rng(WHOLE, 4)[mine].requires_grad_(), _rng(WHOLE, 4, seed=1)[mine].requires_grad_()
            loss = adnce_loss(z1, z2, temperature=0.3, variant=variant, gather=True, **bump)
            results[f"{variant} {name}"] = (loss.detach(), *torch.autograd.grad(loss, (z1, z2)))
    return results


def test_gathered_negatives_equal_one_process():
    world_size = 2
    together = run_gloo(gathered, world_size)
    for name, (loss, *gradients) in gathered(0, 1).items():
        parts = [results[name] for results in together]
        torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), loss)
        for k, want in enumerate(gradients, start=1):
            got = torch.cat([part[k] for part in parts]) / world_size  # what averaging over processes makes of it
            torch.testing.assert_close(got, want)


# --- KL-DRO -------------------------------------------------------------------------------------------------------


@given(temperature=st.floats(1e-3, 1e5), seed=st.integers(0, 50))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_kl_dro_lies_between_mean_and_maximum(temperature, seed):
    neg = _cosines(4, 9, seed=seed)
    value, worst_case, kl = kl_dro(neg, temperature)
    assert (value >= neg.mean(1) - 1e-9).all()
    assert (value <= neg.amax(1) + 1e-9).all()
    assert (value > kl_dro(neg, temperature * 1.5).value).all()
    torch.testing.assert_close(worst_case, (neg / temperature).softmax(1))
    entropy = (torch.xlogy(worst_case, worst_case) + worst_case * math.log(9)).sum(1)
    torch.testing.assert_close(kl, entropy, rtol=1e-6, atol=1e-12)
    # the definition: expectation under the worst case minus the penalty
    torch.testing.assert_close((worst_case * neg).sum(1) - temperature * kl, value, rtol=1e-9, atol=1e-9)


def test_kl_dro_gradient_is_the_worst_case():
    neg = _cosines(3, 6).requires_grad_()
    value, worst_case, _kl = kl_dro(neg, 0.3)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), neg, retain_graph=True)[0], worst_case.detach())
    assert torch.autograd.gradcheck(lambda x: kl_dro(x, 0.3), (neg,))


def test_kl_dro_is_the_worst_of_all_distributions():
    neg, temperature = _cosines(1, 5), 0.4
    best = kl_dro(neg, temperature).value.item()
    for seed in range(200):
        q = (_rng(5, seed=seed) * 2).softmax(0)
        objective = (q * neg[0]).sum() - temperature * (q * (q * 5).log()).sum()
        assert objective.item() <= best + 1e-12


def test_kl_dro_masked_rows_are_shorter_rows():
    neg = _cosines(1, 6)
    mask = torch.tensor([[True, True, False, True, False, True]])
    for temperature in (0.1, 1e5):
        masked, short = kl_dro(neg, temperature, mask), kl_dro(neg[mask][None], temperature)
        torch.testing.assert_close(masked.value, short.value)
        torch.testing.assert_close(masked.kl, short.kl)
        torch.testing.assert_close(masked.worst_case[mask][None], short.worst_case)
        assert not masked.worst_case[~mask].any()


def test_kl_dro_in_float32():
    neg = _cosines(3, 40).float().requires_grad_()
    for temperature in (1e-42, 1e-3, 1e6):
        result = kl_dro(neg, temperature)
        limit = neg.mean(1) if temperature > 1 else neg.amax(1)
        torch.testing.assert_close(result.value, limit, rtol=0, atol=5e-3)
        assert all(part.isfinite().all() for part in result)
        assert torch.autograd.grad(result.value.sum(), neg)[0].isfinite().all()


def test_info_nce_with_the_mean_is_kl_dro():
    pos, neg, temperature = _cosines(4), _cosines(4, 7, seed=1), 0.3
    loss = adnce_from_similarity(
        pos, neg, temperature=temperature, include_positive=False, average_negatives=True, reduction="none"
    )
    torch.testing.assert_close(temperature * loss, kl_dro(neg, temperature).value - pos)


@given(seed=st.integers(0, 30), share=st.floats(1e-6, 0.999))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_temperature_inverts_the_radius(seed, share):
    neg = _cosines(3, 8, seed=seed)
    eta = share * math.log(8)
    temperature, robust, _ = kl_dro_temperature(neg, eta)
    for row in range(3):
        tau = temperature[row].item()
        value, worst_case, kl = kl_dro(neg[row : row + 1], tau)
        assert kl.item() == pytest.approx(eta, rel=1e-7)
        assert robust[row].item() == pytest.approx((worst_case[0] * neg[row]).sum().item(), abs=1e-9)
        assert robust[row].item() == pytest.approx(tau * eta + value.item(), abs=1e-9)


def test_temperature_inverts_the_radius_of_many_scales():
    neg = _cosines(5, 40)
    scale = torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e9], dtype=F64)[:, None]
    temperature = kl_dro_temperature(neg * scale + 7 * scale, 0.4).temperature
    torch.testing.assert_close(temperature, kl_dro_temperature(neg, 0.4).temperature * scale[:, 0], rtol=1e-8, atol=0)


def test_robust_value_gradient_is_the_worst_case():
    neg = _cosines(3, 8).requires_grad_()
    result = kl_dro_temperature(neg, 0.5)
    assert not result.temperature.requires_grad
    assert not result.gaussian_approximation.requires_grad
    gradient = torch.autograd.grad(result.robust_value.sum(), neg)[0]
    for row in range(3):
        worst_case = kl_dro(neg[row : row + 1], result.temperature[row].item()).worst_case[0]
        torch.testing.assert_close(gradient[row], worst_case.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [1e-8, 1e-4, 0.01])
def test_gaussian_approximation_of_a_small_radius(eta):
    neg = _cosines(20, 200)
    result = kl_dro_temperature(neg, eta)
    torch.testing.assert_close(result.gaussian_approximation, result.temperature, rtol=0.05, atol=0)
    want = neg.std(1, correction=0) / math.sqrt(2 * eta)
    torch.testing.assert_close(result.gaussian_approximation, want)
    spread = neg.mean(1) + (2 * eta * neg.var(1, correction=0)).sqrt()
    torch.testing.assert_close(result.robust_value, spread, rtol=0, atol=0.01)


def test_a_ball_that_holds_the_maximum():
    neg = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.9, 0.9, 0.2, 0.3], [0.5] * 4], dtype=F64).requires_grad_()
    for eta in (math.log(4), 5.0):
        result = kl_dro_temperature(neg, eta)
        assert result.temperature.tolist() == [0.0, 0.0, 0.0]
        assert result.robust_value.tolist() == [0.9, 0.9, 0.5]
    # below log 4 the first row has a temperature, the second one (two maxima, limit log 2) has none
    temperature, robust, _ = kl_dro_temperature(neg, 1.0)
    assert temperature[0] > 0
    assert temperature[1:].tolist() == [0.0, 0.0]
    assert robust[1:].tolist() == [0.9, 0.5]
    gradient = torch.autograd.grad(robust.sum(), neg)[0]
    torch.testing.assert_close(gradient.sum(1), torch.ones(3, dtype=F64))
    assert kl_dro_temperature(torch.tensor([[0.3]]), 0.1).robust_value.item() == pytest.approx(0.3)


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-15])
def test_a_radius_just_below_the_limit_with_close_maxima(gap):
    neg = torch.tensor([[0.5, 0.5 - gap, -0.5, 0.0]], dtype=F64)
    temperature, robust, _ = kl_dro_temperature(neg, math.log(4) - 1e-6)
    assert 0 < temperature.item() < gap
    assert robust.item() == pytest.approx(0.5, abs=1e-6)


def test_temperature_in_half_precision_comes_back_in_it():
    result = kl_dro_temperature(_cosines(2, 6).bfloat16(), 0.3)
    assert {part.dtype for part in result} == {torch.bfloat16}
    assert all(part.isfinite().all() for part in result)


# --- bounds on divergences ----------------------------------------------------------------------------------------


def _star(phi, s):
    if phi == "kl":
        return (s - 1).exp()
    if phi == "chi2":
        return torch.where(s >= -2, s + s * s / 4, -1.0)
    return torch.where(s < 0, -1 - (-s).log(), torch.inf)


@pytest.mark.parametrize("phi", ["kl", "chi2", "reverse_kl"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_dual_lambda_is_the_minimum(phi, scale):
    pos, neg = _rng(11), _rng(17, seed=1) * scale + 3
    value, dual_lambda = phi_divergence_lower_bound(pos, neg, phi)
    objective = [
        (lam + _star(phi, neg - lam).mean()).item() for lam in dual_lambda + torch.linspace(-2, 2, 401).double()
    ]
    assert pos.mean().item() - value.item() == pytest.approx(objective[200], rel=1e-9)
    assert min(objective) >= objective[200] - 1e-9


@pytest.mark.parametrize("phi", ["kl", "chi2", "reverse_kl"])
def test_bound_gradient_by_the_envelope_theorem(phi):
    pos, neg = _rng(4).requires_grad_(), (_rng(6, seed=1) * 2).requires_grad_()
    value, dual_lambda = phi_divergence_lower_bound(pos, neg, phi)
    assert not dual_lambda.requires_grad
    assert torch.autograd.gradcheck(lambda p, n: phi_divergence_lower_bound(p, n, phi).value, (pos, neg))
    # a constant added to all scores changes nothing
    shifted = phi_divergence_lower_bound(pos + 1e3, neg + 1e3, phi)
    torch.testing.assert_close(shifted.value, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted.dual_lambda, dual_lambda + 1e3)


def _gaussians():
    # P = N(0.5, 1), Q = N(0, 1): log ratio x/2 - 1/8
    p, q = _rng(100_000) + 0.5, _rng(100_000, seed=1)
    ratio = {"p": (p / 2 - 1 / 8).exp(), "q": (q / 2 - 1 / 8).exp()}
    return p, q, ratio


@pytest.mark.parametrize(
    ("phi", "best", "truth"),
    [
        ("kl", torch.log, 0.125),
        ("chi2", lambda r: 2 * r, math.exp(0.25) - 1),
        ("reverse_kl", lambda r: -1 / r, 0.125),
    ],
)
def test_bounds_of_two_gaussians(phi, best, truth):
    p, q, ratio = _gaussians()
    bound = phi_divergence_lower_bound(best(ratio["p"]), best(ratio["q"]), phi).value.item()
    assert bound == pytest.approx(truth, abs=0.02)
    others = [(0.5 * best(ratio["p"]), 0.5 * best(ratio["q"])), (p**2, q**2), (p * 0, q * 0)]
    for pos, neg in others:
        assert phi_divergence_lower_bound(pos, neg, phi).value.item() < bound


def test_chi2_within_the_valid_range_is_mean_minus_a_quarter_of_the_variance():
    pos, neg = _rng(7), _rng(9, seed=1) * 0.1
    value = phi_divergence_lower_bound(pos, neg, "chi2").value
    torch.testing.assert_close(value, pos.mean() - neg.mean() - neg.var(correction=0) / 4)
    # f * c for f = 2 dP/dQ and outside the range: never below the zero function's bound of 0 at the best scale
    assert phi_divergence_lower_bound(pos * 0, neg * 0, "chi2").value.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("phi", ["kl", "chi2", "reverse_kl"])
def test_bounds_with_extreme_scores(phi):
    pos = torch.tensor([1e4, -1e4], requires_grad=True)
    neg = torch.tensor([1e4, -1e4, 0.0, 1e4 - 1e-3], requires_grad=True)
    value, dual_lambda = phi_divergence_lower_bound(pos, neg, phi)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert dual_lambda.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (pos, neg)))
    assert phi_divergence_lower_bound(pos[:1], neg[:1], phi).value.item() == pytest.approx(0.0, abs=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------------

Z, P, N = torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 5)
ON = torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_and_sigma(value):
    for name, call in (
        ("temperature", lambda: adnce_loss(Z, Z, temperature=value)),
        ("temperature", lambda: info_nce_loss(Z, Z, temperature=value)),
        ("temperature", lambda: adnce_from_similarity(P, N, temperature=value)),
        ("temperature", lambda: ADNCELoss(value)),
        ("temperature", lambda: kl_dro(N, value)),
        ("sigma", lambda: adnce_loss(Z, Z, mu=0.5, sigma=value)),
        ("sigma", lambda: adnce_from_similarity(P, N, temperature=0.1, mu=0.5, sigma=value)),
        ("sigma", lambda: adnce_log_weights(N, 0.5, value)),
        ("sigma", lambda: ADNCELoss(0.5, 0.5, value)),
        ("eta", lambda: kl_dro_temperature(N, value)),
        ("tol", lambda: kl_dro_temperature(N, 0.1, tol=value)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be a positive finite number, got {value!r}"):
            call()


BAD_ARGUMENTS = [
    (lambda: adnce_loss(Z, Z, mu=0.5), r"mu and sigma must be given together or not at all, got mu=0.5 and sigma=None"),
    (lambda: adnce_from_similarity(P, N, temperature=0.1, sigma=1.0), "mu and sigma must be given together"),
    (lambda: ADNCELoss(0.5, sigma=1.0), "mu and sigma must be given together"),
    (lambda: adnce_loss(Z, Z, mu=math.nan, sigma=1.0), "mu must be a finite number"),
    (lambda: adnce_log_weights(N, math.inf, 1.0), "mu must be a finite number"),
    (lambda: adnce_loss(Z[:1], Z[:1]), "batch of 1: at least two rows are needed"),
    (lambda: adnce_loss(Z[:1], Z[:1], variant="graphcl"), "at least two"),
    (lambda: adnce_loss(Z[:0], Z[:0], variant="simcse"), "batch of 0: at least one row is needed"),
    (lambda: adnce_loss(Z, Z[:3]), r"same shape \(B, d\) with d >= 1, got \(4, 3\) and \(3, 3\)"),
    (lambda: adnce_loss(P, P), "same shape"),
    (lambda: adnce_loss(Z[:, :0], Z[:, :0]), "d >= 1"),
    (lambda: adnce_loss(Z, Z.long()), "z2 must be a floating-point tensor, got dtype torch.int64"),
    (
        lambda: adnce_loss(Z, Z, variant="simlcr"),
        r"unknown variant 'simlcr'; accepted: graphcl, simclr, simcse; did you mean 'simclr'\?",
    ),
    (lambda: ADNCELoss(variant="images"), "unknown variant 'images'"),
    (lambda: adnce_loss(Z, Z, reduction="avg"), "unknown reduction 'avg'"),
    (lambda: adnce_from_similarity(P, N, temperature=0.1, reduction="avg"), "unknown reduction 'avg'"),
    (lambda: adnce_from_similarity(P, N[:3], temperature=0.1), r"got \(4,\) and \(3, 5\)"),
    (lambda: adnce_from_similarity(P, N[:, :0], temperature=0.1), "no columns"),
    (lambda: adnce_from_similarity(P, N, temperature=0.1, mask=ON[:3]), r"got \(3, 5\)"),
    (lambda: adnce_from_similarity(P, N, temperature=0.1, mask=ON.long()), "mask must be boolean"),
    (lambda: adnce_log_weights(N[:, :0], 0.5, 1.0), r"N >= 1, got \(4, 0\)"),
    (lambda: adnce_log_weights(N.long(), 0.5, 1.0), "similarity must be a floating-point tensor"),
    (lambda: adnce_log_weights(N, 0.5, 1.0, ON[:, :2]), r"got \(4, 2\)"),
    (lambda: kl_dro(P, 0.1), r"neg_sim must have shape \(A, N\)"),
    (lambda: kl_dro(N[:0], 0.1), r"A, N >= 1, got \(0, 5\)"),
    (lambda: kl_dro(N, 0.1, ON[0]), r"got \(5,\)"),
    (lambda: kl_dro_temperature(P, 0.1), r"neg_sim must have shape \(A, N\)"),
    (lambda: kl_dro_temperature(N.log(), 0.1), "neg_sim must be finite"),
    (lambda: phi_divergence_lower_bound(P, P, "kl2"), "unknown phi 'kl2'; accepted: chi2, kl, reverse_kl"),
    (lambda: phi_divergence_lower_bound(N, P), r"pos_score must have shape \(n,\) with n >= 1, got \(4, 5\)"),
    (lambda: phi_divergence_lower_bound(P, P[:0]), r"neg_score must have shape \(n,\)"),
    (lambda: phi_divergence_lower_bound(P, P.long()), "neg_score must be a floating-point tensor"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_module_shows_its_options():
    assert repr(ADNCELoss(0.2, 0.7, 1.0, "graphcl")) == (
        "ADNCELoss(temperature=0.2, mu=0.7, sigma=1.0, variant='graphcl', reduction='mean', gather=False)"
    )
