"""The fused kernels in a captured forward: launched again as they were, for other members of another step."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import LoraConfig

import esengine
from esengine.kernels.noise import INTERPRET
from esengine.models.graphs import Graphs
from esengine.models.sana.sana_block import fused_parts, patched

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj_out", "linear"]


@pytest.mark.parametrize("config", [LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS), esengine.Direct(TARGETS)])
def test_fused_blocks_replay_other_members_and_steps(recorded, monkeypatch, config):
    """The kernels themselves, launched again with the scalars they had: what changes must come by memory."""
    from triton.runtime.interpreter import InterpretedFunction

    run, launches = InterpretedFunction.run, []

    def noted(self, *args, **kwargs):
        launches.append(self)
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()

        def launch():
            with torch.utils._python_dispatch._disable_current_modes():
                run(self, *args, **kwargs)

        if mode is not None:
            mode.calls.append((launch, (), {}, None))
        launch()

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=4, patch_size=1, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    transformer.eval().requires_grad_(False)
    population = esengine.attach(transformer, config, esengine.Noise(sigma=3e-2, rank=1, seed=1), backend="triton")
    population.update(step=0, fitness=torch.tensor([30.0, -30.0]))  # a LoRA's B starts at nought
    x, text = torch.randn(2, 4, 2, 3), torch.randn(2, 5, 24)

    @contextmanager
    def session(x_bchw, step, members):
        time, mask = torch.full((2,), 0.7), torch.ones(2, 5, dtype=torch.int64)
        arguments = dict(timestep=time, guidance=time, encoder_attention_mask=mask, return_dict=False)
        with ExitStack() as inside:
            inside.enter_context(population.perturbed(step=step, members=members))
            inside.enter_context(patched(fused_parts(transformer, True), population.perturbation))
            yield lambda: transformer(x_bchw, encoder_hidden_states=text, **arguments)[0]

    captured = Graphs(session)
    seen = []
    for step, members in ((3, [5, 0]), (3, [5, 0]), (9, [2, 2])):
        now = torch.tensor([step]), torch.tensor(members)
        got = captured(x, *now).clone()
        with torch.no_grad(), session(x, step, now[1]) as compute:
            assert torch.equal(got, compute())
        seen.append(got)
        if len(seen) == 2:
            population.update(step=1, fitness=torch.tensor([3.0, -3.0]))  # in place: no capture anew
    assert len(recorded) == 1
    assert launches
    assert not torch.equal(seen[1], seen[2])
