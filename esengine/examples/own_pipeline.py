"""Your own diffusers pipeline: its call runs inside `population.perturbed`, and `Engine` makes the steps.

The pipeline here is a small, untrained DDIMPipeline, a family that `--model` does not know. It learns to draw dark
pictures. Nothing in the pipeline is changed.
"""

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from peft import LoraConfig

import esengine


def pipeline() -> DDIMPipeline:
    """Weights from a seed. Yours come from `from_pretrained`."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    unet = UNet2DModel(16, 3, 3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, **blocks)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.unet.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DDIMPipeline, seeds: torch.Tensor) -> np.ndarray:
    """One image for each seed, float32 [B, H, W, 3] in [0, 1]. A row's latents depend on its own seed alone."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return pipe(batch_size=len(generators), generator=generators, num_inference_steps=4, output_type="np").images


def darkness(images: np.ndarray) -> torch.Tensor:
    """float32 [B], higher is darker."""
    return torch.from_numpy(1 - images.mean(axis=(1, 2, 3)))


@torch.no_grad()
def main() -> None:
    pipe = pipeline()
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"])
    rule = esengine.UpdateRule(lr_scale=2.0)
    population = esengine.attach(pipe.unet, adapter, esengine.Noise(sigma=0.05), rule=rule)
    engine = esengine.Engine(population, esengine.PromptSampler(64, per_step=4, seed=0), size=16)  # "prompts" are seeds

    before = darkness(draw(pipe, torch.arange(1000, 1032)))
    for task in engine.tasks(until=12):
        rows = task.rows()
        with population.perturbed(step=task.step, members=rows.members):
            images = draw(pipe, rows.prompts)
        print(f"step {task.step + 1}: mean darkness {darkness(images).mean():.4f}")
        engine.tell(task, darkness(images))
    gain = darkness(draw(pipe, torch.arange(1000, 1032))) - before
    print(f"gain {gain.mean():+.4f} +- {gain.std() / len(gain) ** 0.5:.4f} on {len(gain)} held-out images")


if __name__ == "__main__":
    main()
