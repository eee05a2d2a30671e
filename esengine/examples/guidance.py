"""Classifier-free guidance: the denoiser's batch holds each image twice, so `perturbed` takes `copies=2`.

The pipeline is an untrained Stable Diffusion of the package's tests. It calls its UNet once with the negative rows on
top of the positive ones. Row i of such a batch belongs to member i modulo the number of images.
"""

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

import esengine
from esengine.models import tiny_pipeline


def draw(pipe: StableDiffusionPipeline, text: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W] in [0, 1], one image for each of the latents [B, 4, h, w]."""
    rows = {name: each.expand(len(latents), -1, -1) for name, each in text.items()}
    return pipe(latents=latents.clone(), **rows, guidance_scale=3.0, num_inference_steps=2, output_type="pt").images


def redness(images: torch.Tensor) -> torch.Tensor:
    """float32 [B]: how much more red than green and blue there is."""
    red, green, blue = images.mean(dim=(2, 3)).T
    return red - (green + blue) / 2


@torch.no_grad()
def main() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline("sd"), safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = pipe.encode_prompt("a lamp", "cpu", 1, True, "blurred")  # 1 image, with guidance
    text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    latents = torch.randn(8 + 16, 4, *2 * [pipe.unet.config.sample_size], generator=torch.Generator().manual_seed(0))
    train, held_out = latents[:8], latents[8:]
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    rule = esengine.UpdateRule(lr_scale=2.0)
    population = esengine.attach(pipe.unet, adapter, esengine.Noise(sigma=0.05), rule=rule)
    engine = esengine.Engine(population, esengine.PromptSampler(len(train), per_step=4, seed=0), size=16)

    with population.perturbed(step=0, members=torch.tensor([3, 8]), copies=2):
        together = draw(pipe, text, train[:2])
    with population.perturbed(step=0, members=torch.tensor([8]), copies=2):
        alone = draw(pipe, text, train[1:2])
    print(f"member 8 beside member 3 and alone: largest difference {(together[1:] - alone).abs().max():.1e}")

    before = redness(draw(pipe, text, held_out))
    for task in engine.tasks(until=10):
        rows = task.rows()
        with population.perturbed(step=task.step, members=rows.members, copies=2):
            scores = redness(draw(pipe, text, train[rows.prompts]))
        engine.tell(task, scores)
        print(f"step {task.step + 1}: mean redness {scores.mean():+.4f}")
    gain = redness(draw(pipe, text, held_out)) - before
    print(f"gain {gain.mean():+.4f} +- {gain.std() / len(gain) ** 0.5:.4f} on {len(gain)} held-out images")


if __name__ == "__main__":
    main()
