"""trl's DDPOTrainer on a model; run by `benchmarks.speed.peer` in an environment that has no b2ray.

    python peer_trl.py '{"model": …, "reward": …, …}'

Prints, as the last line, what each epoch took.
"""

import json
import random
import sys
import time

import torch
from transformers import AutoTokenizer, CLIPModel
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def main() -> None:
    """Train, and print the times."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    draw = random.Random(given["seed"])
    config = DDPOConfig(
        seed=given["seed"],
        mixed_precision="no",
        allow_tf32=False,
        save_freq=10**9,
        sample_num_steps=given["steps"],
        sample_guidance_scale=given["guidance"],
        sample_batch_size=given["sample_batch"],
        sample_num_batches_per_epoch=given["images"] // given["sample_batch"],
        train_batch_size=given["batch"],
        train_num_inner_epochs=given["inner_epochs"],
        train_learning_rate=given["lr"],
        train_clip_range=given["clip"],
        per_prompt_stat_tracking=True,
        project_kwargs={"automatic_checkpoint_naming": False},
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(given["model"], use_lora=True)
    trainer = DDPOTrainer(
        config,
        clip_score(given["reward"], given["mean"], given["std"]),
        lambda: (draw.choice(given["prompts"]), {}),
        pipeline,
    )
    sampling: list[float] = []
    generate = trainer._generate_samples

    def timed(*args, **kwargs):
        began = time.perf_counter()
        found = generate(*args, **kwargs)
        sampling.append(time.perf_counter() - began)
        return found

    trainer._generate_samples = timed
    found, step = [], 0
    for epoch in range(given["epochs"]):
        began = time.perf_counter()
        step = trainer.step(epoch, step)
        found.append({"seconds": time.perf_counter() - began, "sampling": sampling[-1]})
    print(json.dumps(found))


def clip_score(path: str, mean: list, std: list):
    """The cosine between a picture's and its prompt's embedding, of pictures that fit the model."""
    model = CLIPModel.from_pretrained(path).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    size = model.config.vision_config.image_size
    limit = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images, prompts, _):
        assert images.shape[-2:] == (size, size)
        tokens = tokenizer(
            list(prompts),
            truncation=True,
            max_length=limit,
            padding="max_length",
            return_tensors="pt",
        )
        pixels = ((images.float() * 255).round() / 255 - mean) / std
        pictures = model.get_image_features(pixel_values=pixels)
        texts = model.get_text_features(**tokens)
        cosines = torch.nn.functional.cosine_similarity(pictures, texts)
        return cosines, {}

    return score


if __name__ == "__main__":
    main()
