"""A text model of transformers, trained on a score that has no gradient: how many different words it writes.

The whole population generates in one batch, with its key-value cache: row i belongs to member i, at every token.
"""

import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

import esengine

VOCABULARY, LENGTH = 64, 16


def distinct(tokens: torch.Tensor) -> torch.Tensor:
    """Share of different tokens in each text. tokens: int64 [B, LENGTH]. float32 [B] in (0, 1]."""
    return torch.tensor([len(set(row)) / len(row) for row in tokens.tolist()])


def write(model: GPT2LMHeadModel, prompts: torch.Tensor) -> torch.Tensor:
    """The most likely continuation of each prompt, int64 [B, LENGTH]. prompts: int64 [B, 4]."""
    options = dict(max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, prompts.shape[1] :]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()  # untrained; yours comes from from_pretrained
    prompts = torch.randint(1, VOCABULARY, (64, 4))
    train, held_out = prompts[:32], prompts[32:]
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"])
    rule = esengine.UpdateRule(lr_scale=2.0)
    population = esengine.attach(model, adapter, esengine.Noise(sigma=0.03), rule=rule)
    engine = esengine.Engine(population, esengine.PromptSampler(len(train), per_step=4, seed=0), size=32)

    before = distinct(write(model, held_out))
    for task in engine.tasks(until=20):
        rows = task.rows()  # 32 members x 4 prompts
        with population.perturbed(step=task.step, members=rows.members):
            scores = distinct(write(model, train[rows.prompts]))
        engine.tell(task, scores)
        print(f"step {task.step + 1}: mean share of different tokens {scores.mean():.3f}")
    after = distinct(write(model, held_out))
    gain = after - before
    print(f"from {before.mean():.3f} to {after.mean():.3f} on held-out prompts")
    print(f"gain {gain.mean():+.4f} +- {gain.std() / len(gain) ** 0.5:.4f} on {len(gain)} held-out prompts")


if __name__ == "__main__":
    main()
