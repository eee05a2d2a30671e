"""Your own reward: any function of images and prompts. This one likes blue.

The command line takes it as well: `esengine train --reward esengine.examples.own_reward:blueness`.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig

import esengine
from esengine.models import Rows, load

CAPTIONS = ["a red circle", "a small green cross", "a large white triangle", "a yellow square on the left"]


def blueness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """How much bluer than red and green each image is, in [-1, 1]. images: uint8 [B, 3, H, W]. float32 [B]."""
    red, green, blue = (images.float() / 255).mean(dim=(2, 3)).T
    return blue - (red + green) / 2


def train(reward: Callable[[torch.Tensor, list[str]], torch.Tensor]) -> None:
    model = load("nano")  # a small trained model, part of this package
    texts = model.encode(CAPTIONS)
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["proj_out"])
    rule = esengine.UpdateRule(lr_scale=2.0)
    population = esengine.attach(model.module, adapter, esengine.Noise(sigma=0.03, seed=0), rule=rule)
    engine = esengine.Engine(population, esengine.PromptSampler(len(CAPTIONS), per_step=4, seed=0), size=16)

    def held_out() -> torch.Tensor:
        """Scores of the current adapter on latents that no step draws, float32 [32]."""
        rows = Rows(None, torch.arange(4).repeat(8), torch.arange(8).repeat_interleave(4))
        return reward(model.render(texts, seed=1, step=0, rows=rows), CAPTIONS * 8)

    before = held_out()
    for task in engine.tasks(until=8):
        rows = task.rows()  # 16 members x 4 captions
        images = model.render(texts, seed=0, step=task.step, rows=rows, population=population)
        scores = reward(images, [CAPTIONS[i] for i in rows.prompts])
        engine.tell(task, scores)
        print(f"step {task.step + 1}: mean score {scores.mean():+.4f}")
    after = held_out()
    gain = after - before
    print(f"from {before.mean():+.4f} to {after.mean():+.4f} on held-out images")
    print(f"gain {gain.mean():+.4f} +- {gain.std() / len(gain) ** 0.5:.4f} on {len(gain)} held-out images")


if __name__ == "__main__":
    train(blueness)
