"""Mixtures attached to a Hugging Face model: against PEFT, against the loop, and gone without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from runtime.errors import TensorMismatchError
from runtime.kernels.mixture import mixture_loop
from runtime.kernels.routing import top_k_weights
from runtime.model.attach import ExpertModule, MixtureFFN, attached, decoder_layers, fresh_expert
from runtime.model.base import BaseModel, load_base
from runtime.model.expert import Expert, LowRank
from runtime.model.generation import base_ref
from runtime.model.manifest import FFN_TARGETS

RANK, ALPHA = 4, 12.0
IDS = torch.tensor([[1, 30, 41, 52, 63, 74, 5, 96, 107, 2]])


def random_expert(base: BaseModel, layer: int, seed: int, rank: int = RANK) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_expert(layer, rank=rank, alpha=ALPHA, base=base_ref(base.info), generator=generator)
    updates = {t: LowRank(u.a, torch.randn(u.b.shape, generator=generator) * 0.1) for t, u in fresh.updates.items()}
    return Expert(layer=layer, scale=fresh.scale, updates=updates)


def one_expert_everywhere(base: BaseModel) -> dict[int, MixtureFFN]:
    return {
        i: MixtureFFN(
            layer.mlp,
            [ExpertModule(random_expert(base, i, seed=i), trainable=False)],
            torch.zeros(1, base.info.width),
            top_k=1,
        )
        for i, layer in enumerate(decoder_layers(base.model))
    }


def logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = base.model(IDS).logits
    return result


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_one_task_with_one_expert_equals_lora_of_peft(tiny_base_folder: Path, tiny_base: BaseModel) -> None:
    ffns = one_expert_everywhere(tiny_base)
    with attached(tiny_base.model, ffns):
        ours = logits(tiny_base)
    other = load_base(tiny_base_folder, dtype=torch.float32, device=torch.device("cpu"))
    names = [f"{target}_proj" for target in FFN_TARGETS]
    peft = get_peft_model(other.model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)).eval()
    with torch.no_grad():
        for i, layer in enumerate(decoder_layers(other.model)):
            for target, update in random_expert(tiny_base, i, seed=i).updates.items():
                linear = getattr(layer.mlp, f"{target}_proj")
                linear.lora_A["default"].weight.copy_(update.a)
                linear.lora_B["default"].weight.copy_(update.b)
        theirs = peft(IDS).logits
    assert (ours - logits(tiny_base)).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_mixture_of_mixed_ranks_equals_the_loop_in_each_linear(tiny_base: BaseModel, top_k: int) -> None:
    ffn = decoder_layers(tiny_base.model)[2].mlp
    experts = [random_expert(tiny_base, 2, seed=e, rank=rank) for e, rank in enumerate((2, 8, 3))]
    router = torch.randn(3, tiny_base.info.width, generator=torch.Generator().manual_seed(7))
    x = torch.randn(7, tiny_base.info.width, generator=torch.Generator().manual_seed(8))
    weights = top_k_weights(x @ router.t(), torch.ones(7, 3, dtype=torch.bool), torch.full((7,), top_k), top_k)

    def linear(target: str, inputs: torch.Tensor) -> torch.Tensor:
        updates = [expert.updates[target] for expert in experts]
        update = mixture_loop(
            inputs, [u.a for u in updates], [u.b for u in updates], [e.scale for e in experts], weights
        )
        return getattr(ffn, f"{target}_proj")(inputs) + update

    with torch.no_grad():
        wanted = linear("down", ffn.act_fn(linear("gate", x)) * linear("up", x))
        mixture = MixtureFFN(ffn, [ExpertModule(e, trainable=False) for e in experts], router, top_k=top_k)
        found = mixture(x.view(1, 7, -1))[0]
    assert (mixture.weights > 0).sum(1).eq(top_k).all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_fresh_expert_changes_nothing(tiny_base: BaseModel) -> None:
    generator = torch.Generator().manual_seed(0)
    fresh = fresh_expert(1, rank=8, alpha=16.0, base=base_ref(tiny_base.info), generator=generator)
    ffn = decoder_layers(tiny_base.model)[1].mlp
    mixture = MixtureFFN(ffn, [ExpertModule(fresh, trainable=True)], torch.zeros(1, tiny_base.info.width), top_k=1)
    before = logits(tiny_base)
    with attached(tiny_base.model, {1: mixture}):
        assert torch.equal(logits(tiny_base), before)


def test_a_model_is_bit_for_bit_the_old_one_after_detaching(tiny_base: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_base.model.state_dict().items()}
    modules, output = list(tiny_base.model.modules()), logits(tiny_base)
    with attached(tiny_base.model, one_expert_everywhere(tiny_base)):
        assert not torch.equal(logits(tiny_base), output)
    after = tiny_base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(one is other for one, other in zip(tiny_base.model.modules(), modules, strict=True))
    assert torch.equal(logits(tiny_base), output)


def test_a_model_is_restored_when_the_run_with_the_mixture_fails(tiny_base: BaseModel) -> None:
    modules = list(tiny_base.model.modules())
    with pytest.raises(KeyboardInterrupt), attached(tiny_base.model, one_expert_everywhere(tiny_base)):
        raise KeyboardInterrupt
    assert all(one is other for one, other in zip(tiny_base.model.modules(), modules, strict=True))


def test_what_experts_cannot_be_attached_to_is_refused(tiny_base: BaseModel) -> None:
    width = tiny_base.info.width
    expert = ExpertModule(random_expert(tiny_base, 0, seed=0), trainable=False)
    with pytest.raises(TensorMismatchError, match="Linear has no gate_proj"):
        MixtureFFN(nn.Linear(width, width), [expert], torch.zeros(1, width), top_k=1)
    with pytest.raises(TensorMismatchError, match="2 rows for 1 experts"):
        MixtureFFN(decoder_layers(tiny_base.model)[0].mlp, [expert], torch.zeros(2, width), top_k=1)
    with pytest.raises(TensorMismatchError, match=r"Linear has no model\.layers"):
        attached(nn.Linear(1, 1), {}).__enter__()


def test_a_router_that_chooses_one_expert_learns_although_the_choice_weighs_one(tiny_base: BaseModel) -> None:
    ffn = decoder_layers(tiny_base.model)[2].mlp
    experts = [ExpertModule(random_expert(tiny_base, 2, seed=e), trainable=False) for e in range(3)]
    router = torch.randn(3, tiny_base.info.width, generator=torch.Generator().manual_seed(7))
    x = torch.randn(7, tiny_base.info.width, generator=torch.Generator().manual_seed(8))
    trained = MixtureFFN(ffn, experts, nn.Parameter(router.clone()), top_k=1)  # type: ignore[arg-type]
    served = MixtureFFN(ffn, experts, router, top_k=1)  # type: ignore[arg-type]
    y = trained(x)
    assert torch.equal(y, served(x))
    assert trained.weights.unique().tolist() == [0.0, 1.0]
    y.square().sum().backward()
    gradient = trained.router.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
